"""Hugging Face folders: the same numbers and files come out, and every way to be broken has one line."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge.errors import CheckpointError
from export.checkpoint import Origin, open_checkpoint
from tests.export import tiny, tiny_qwen3_5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_folder(tmp_path / "model", tiny.qwen2_config())


def change(path: Path, **changes: Any) -> None:
    tiny.write_json(path, {**json.loads(path.read_text()), **changes})


def fails(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught, open_checkpoint(path):
        pass
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_rows_are_the_numbers_that_were_written(tmp_path: Path, dtype: str, num_shards: int) -> None:
    config = tiny.qwen3_config(tie_word_embeddings=False)
    tiny.write_folder(tmp_path / "m", config, seed=3, dtype=dtype, num_shards=num_shards)
    written = tiny.random_tensors(config, seed=3)
    if dtype == "F16":
        written = {name: values.astype(np.float16).astype(np.float32) for name, values in written.items()}
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.tensors.keys() == written.keys()
        for name, values in written.items():
            assert checkpoint.tensors[name].shape == values.shape
            assert checkpoint.tensors[name].dtype == dtype
            rows = checkpoint.rows(name)
            assert rows.dtype == np.float32
            assert rows.flags.c_contiguous
            np.testing.assert_array_equal(rows, values)
        name = "model.embed_tokens.weight"
        np.testing.assert_array_equal(checkpoint.rows(name, 7, 11), written[name][7:11])


def test_config_generation_text_and_source(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert dict(checkpoint.config) == tiny.qwen2_config()
        generation = checkpoint.generation
        assert generation.eos_token_ids == (tiny.EOS, tiny.BOS)
        assert (generation.temperature, generation.top_p, generation.top_k) == (0.7, 0.8, 20)
        assert generation.repetition_penalty == 1.1
        assert generation.do_sample
        assert checkpoint.vocab_ids() == tiny.NUM_IDS
        assert checkpoint.chat_template() == tiny.CHAT_TEMPLATE
        assert checkpoint.tokenizer_json() == tiny.tokenizer_json()
        source = checkpoint.hash_files()
    assert (source.kind, source.location, source.revision) == ("folder", "model", None)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert source.sha256 == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_hashing_reports_every_byte_and_keeps_the_origin(folder: Path) -> None:
    done: list[int] = []
    with open_checkpoint(folder, origin=Origin("hub", "Org/Name", "abc")) as checkpoint:
        source = checkpoint.hash_files(done.append)
        assert sum(done) == checkpoint.num_file_bytes
    assert (source.kind, source.location, source.revision) == ("hub", "Org/Name", "abc")


def test_end_of_turn_stops_a_chat_model_whose_config_forgets_it(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=tiny.BOS)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.generation.eos_token_ids == (tiny.BOS, tiny.EOS)
        assert checkpoint.generation.temperature is None
        assert not checkpoint.generation.do_sample


def test_template_file_wins_and_a_list_of_templates_has_a_default(folder: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    change(folder / "tokenizer_config.json", chat_template=templates)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.chat_template() == "yes"
    (folder / "chat_template.jinja").write_text("from the file")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.chat_template() == "from the file"


def test_tokenizer_is_rebuilt_from_vocab_and_merges(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    tiny.write_json(folder / "vocab.json", tiny.vocab())
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in tiny.MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    decoder = {str(256 + len(tiny.MERGES) + i): {"content": text, "special": True} for i, text in enumerate(tiny.ADDED)}
    change(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    text = "hello world, naïve ẛ̣ 你好 <|im_end|>don't\n\n  x"
    with open_checkpoint(folder) as checkpoint:
        rebuilt = Tokenizer.from_buffer(checkpoint.tokenizer_json())
        assert checkpoint.vocab_ids() == tiny.NUM_IDS
    assert rebuilt.encode(text).ids == Tokenizer.from_buffer(tiny.tokenizer_json()).encode(text).ids


def test_a_tied_head_that_is_stored_again_is_left_out(folder: Path) -> None:
    config = tiny.qwen2_config()
    tensors = tiny.random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    with open_checkpoint(folder) as checkpoint:
        assert "lm_head.weight" not in checkpoint.tensors
        assert "ties it" in checkpoint.notes[0]


def test_what_is_no_checkpoint_says_what_to_give(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in fails(tmp_path / "nowhere")
    assert "give the folder" in fails(folder / "model.safetensors")
    (empty := tmp_path / "empty").mkdir()
    assert "no config.json" in fails(empty)
    (empty / "x.gguf").touch()
    assert "x.gguf" in fails(empty)
    (empty / "manifest.json").touch()
    assert f"it is a bundle already: qwedge serve --bundle {empty}" in fails(empty)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    assert "can run code" in fails(folder)


def test_quantized_folders_are_named(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "gptq" in fails(folder)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", "[1]", "no JSON object"),
        ("config.json", '{"a": 1, "a": 2}', "twice"),
        ("config.json", "[" * 100_000, "no JSON"),
        ("config.json", b"\xff\xfe{}", "no JSON"),
        ("tokenizer.json", "{}", "no usable tokenizer"),
        ("tokenizer_config.json", '{"chat_template": 5}', "no text"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "not a token id"),
        ("generation_config.json", '{"eos_token_id": 1, "temperature": true}', "not a number"),
        ("generation_config.json", '{"eos_token_id": 1, "top_p": 1.5}', "from 0 to 1"),
        ("generation_config.json", '{"eos_token_id": 1, "top_k": 1.5}', "whole number"),
    ],
)
def test_broken_side_files(folder: Path, file: str, content: str | bytes, expected: str) -> None:
    (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    assert expected in fails(folder)


def test_no_stop_id_at_all(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    change(folder / "config.json", eos_token_id=None)
    assert "eos_token_id" in fails(folder)


def test_a_message_stays_one_short_line_whatever_the_file_says(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id="x\n" * 100_000)
    assert len(fails(folder)) < 300


def with_header(path: Path, header: dict[str, Any] | bytes, data: bytes, *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, *, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "expected"),
    [
        ({"a": entry(0, 8)}, bytes(8), 1 << 62, "claims a header"),
        ({"a": entry(0, 8)}, bytes(8), 4, "no JSON"),
        (b'{"a": 1, "a": 2}', b"", None, "twice"),
        (b"[]", b"", None, "no JSON object"),
        ({"a": 7}, b"", None, "'a' is described"),
        ({"a": entry(0, 8)}, bytes(4), None, "'a' ends at byte"),
        ({"a": entry(0, 8)}, bytes(12), None, "4 bytes after its last tensor"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), None, "share"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16), None, "'b' leaves a hole"),
        ({"a": entry(0, 8, shape=[3])}, bytes(8), None, "'a': F32 [3] needs 12 bytes"),
        ({"a": entry(0, 8, shape=[1 << 40, 1 << 40])}, bytes(8), None, "'a': F32"),
        ({"a": entry(0, 8, shape=[-2])}, bytes(8), None, "'a' has shape"),
        ({"a": entry(0, 8, shape=[])}, bytes(8), None, "'a' has shape"),
        ({"a": entry(0, 8, shape=[2, 0])}, bytes(8), None, "'a' has shape"),
        ({"a": entry(0, 8, shape="x")}, bytes(8), None, "'a' has shape"),
        ({"a": entry(8, 0, shape=[2])}, bytes(8), None, "'a': F32"),
        ({"a": {**entry(0, 8), "data_offsets": [0.0, 8]}}, bytes(8), None, "'a' has data_offsets"),
        ({"a": entry(0, 8, dtype="I32")}, bytes(8), None, "'a' has dtype 'I32'"),
        ({"a": entry(0, 8, dtype=["F32"])}, bytes(8), None, "'a' has dtype"),
    ],
)
def test_headers_that_lie(folder: Path, header: Any, data: bytes, length: int | None, expected: str) -> None:
    with_header(folder / "model.safetensors", header, data, length=length)
    message = fails(folder)
    assert expected in message
    assert "model.safetensors" in message


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        weights.write_bytes(content[:size])
        assert "model.safetensors" in fails(folder)


def test_a_file_that_shrinks_after_it_was_opened(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match="ends at byte"):
            checkpoint.rows("model.norm.weight")


def open_files() -> set[str]:
    """Of this process."""
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_every_file_is_closed_once(tmp_path: Path) -> None:
    """A shard with nothing but vision too, and after a change."""
    config = tiny_qwen3_5.config()
    folder = tiny.write_folder(tmp_path / "m", config)
    parts: dict[str, tiny.Tensors] = {"text": {}, "vision": {}}
    for name, tensor in tiny.random_tensors(config).items():
        parts["vision" if "visual" in name else "text"][name] = tensor
    (folder / "model.safetensors").unlink()
    for part, tensors in parts.items():
        tiny.write_safetensors(folder / f"{part}.safetensors", tensors)
    weight_map = {name: f"{part}.safetensors" for part, tensors in parts.items() for name in tensors}
    tiny.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    before = open_files()
    with open_checkpoint(folder) as checkpoint, checkpoint.changed({}, {}, []) as changed:
        np.testing.assert_array_equal(changed.rows("model.norm.weight"), checkpoint.rows("model.norm.weight"))
        assert len(open_files()) == len(before) + 2
    assert open_files() == before


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tiny.write_folder(tmp_path / "sharded", tiny.qwen2_config(), num_shards=2)

    def index(self, folder: Path) -> dict[str, str]:
        return dict(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])

    def write_index(self, folder: Path, weight_map: Any) -> None:
        tiny.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})

    def test_a_missing_shard(self, folder: Path) -> None:
        (folder / "model-00002-of-00002.safetensors").unlink()
        assert "model-00002-of-00002.safetensors is missing" in fails(folder)

    def test_an_index_that_names_an_absent_tensor(self, folder: Path) -> None:
        self.write_index(folder, {**self.index(folder), "extra": "model-00001-of-00002.safetensors"})
        assert "model-00001-of-00002.safetensors lacks tensor 'extra'" in fails(folder)

    def test_a_tensor_that_the_index_does_not_name(self, folder: Path) -> None:
        index = self.index(folder)
        del index["model.norm.weight"]
        self.write_index(folder, index)
        assert "'model.norm.weight' is not in model.safetensors.index.json" in fails(folder)

    def test_a_tensor_in_two_shards(self, folder: Path) -> None:
        first, second = sorted(folder.glob("*.safetensors"))
        second.write_bytes(first.read_bytes())
        assert "stands in another shard too" in fails(folder)

    @pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a\0.safetensors", "x.bin", 5, None])
    def test_an_index_that_points_elsewhere(self, folder: Path, shard: Any) -> None:
        self.write_index(folder, {**self.index(folder), "extra": shard})
        assert "puts tensor 'extra' into" in fails(folder)

    @pytest.mark.parametrize("weight_map", [{}, [], None, "x"])
    def test_an_index_without_a_map(self, folder: Path, weight_map: Any) -> None:
        self.write_index(folder, weight_map)
        assert "no weight_map" in fails(folder)


def test_a_tokenizer_whose_library_panics(folder: Path) -> None:
    # The library cuts the prefix off the right half of a merge without looking whether it is there.
    document = json.loads(tiny.tokenizer_json())
    document["model"]["continuing_subword_prefix"] = "####"
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert "no usable tokenizer" in fails(folder)
