"""GGUF files: read as the folder they came from, whatever the quantization, and refused in one line when broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer

from edge.errors import CheckpointError
from export.architectures import architecture_for
from export.catalog import find_by_title
from export.checkpoint import Checkpoint, Origin, open_checkpoint
from export.gguf_tokenizer import repair_template
from export.oracle import Decoder
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from export.sources import default_cache, resolve
from tests.export import tiny, tiny_qwen3_5

DATA = Path(__file__).parents[1] / "data"
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
"""Rows of whole blocks for every quantization: the widest block has 256 values."""


def quantizable() -> list[Any]:
    """Every type that the gguf package can both write and read."""
    kinds = []
    for kind in Kind:
        try:
            gguf.quants.dequantize(gguf.quants.quantize(np.ones((1, 256), np.float32), kind), kind)
        except NotImplementedError:
            continue
        kinds.append(kind)
    return kinds


def fails(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught, open_checkpoint(path):
        pass
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", quantizable(), ids=lambda kind: kind.name)
def test_every_chunk_equals_the_whole_dequantized(tmp_path: Path, kind: Any) -> None:
    config = tiny.qwen2_config(**WIDE)
    path = tiny.write_gguf(tmp_path / "m.gguf", config, seed=1, kind=kind)
    name = "model.layers.0.mlp.gate_proj.weight"
    values = tiny.random_tensors(config, seed=1)[name]
    expected = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors[name].dtype == kind.name
        assert checkpoint.tensors[name].shape == values.shape
        chunks = [checkpoint.rows(name, start, min(start + 100, 512)) for start in range(0, 512, 100)]
    np.testing.assert_array_equal(np.concatenate(chunks), expected)


@pytest.mark.parametrize("make_config", [tiny.qwen2_config, tiny.qwen3_config])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_reads_as_the_folder_it_came_from(tmp_path: Path, make_config: Any, tied: bool) -> None:
    config = make_config(tie_word_embeddings=tied)
    tiny.write_folder(tmp_path / "folder", config)
    tiny.write_gguf(tmp_path / "m.gguf", config, kind=Kind.F32)
    with open_checkpoint(tmp_path / "folder") as folder, open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        same_tensors(folder, checkpoint)
        translated = dict(checkpoint.config)
        assert translated.pop("head_dim") == config.get("head_dim", 16)
        assert translated.pop("rope_scaling") is None
        assert {key: config[key] for key in translated} == translated
        assert checkpoint.vocab_ids() == folder.vocab_ids()
        assert checkpoint.chat_template() == folder.chat_template()
        assert checkpoint.generation.eos_token_ids == folder.generation.eos_token_ids
        assert checkpoint.generation.pad_token_id == tiny.BOS
        assert (checkpoint.hash_files().kind, checkpoint.hash_files().location) == ("gguf", "m.gguf")
        text = "hello world <|im_start|>don't\n\n 你好 é 123<tool_call>"
        ours, theirs = (Tokenizer.from_buffer(each.tokenizer_json()) for each in (checkpoint, folder))
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def same_tensors(folder: Checkpoint, checkpoint: Checkpoint) -> None:
    assert checkpoint.tensors.keys() == folder.tensors.keys()
    for name in folder.tensors:
        np.testing.assert_array_equal(checkpoint.rows(name), folder.rows(name), err_msg=name)
        np.testing.assert_array_equal(checkpoint.rows(name, 3, 5), folder.rows(name, 3, 5), err_msg=name)


@pytest.mark.parametrize("value_heads", [2, 4, 6])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_qwen3_5_as_llama_cpp_changes_it_reads_as_the_folder(tmp_path: Path, value_heads: int, kind: Any) -> None:
    config = tiny_qwen3_5.text_config(linear_num_value_heads=value_heads)
    tiny.write_folder(tmp_path / "folder", config, dtype="F32")
    tiny.write_gguf(tmp_path / "m.gguf", config, kind=kind)
    with open_checkpoint(tmp_path / "folder") as folder, open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.tensors.keys() == folder.tensors.keys()
        for name in folder.tensors:
            expected, found = folder.rows(name), checkpoint.rows(name)
            # Norms lose the last bit to the one that is added; matrices half a step of 8 bits.
            np.testing.assert_allclose(found, expected, rtol=2e-7, atol=3e-7 if kind == Kind.F32 else 4e-3)
            np.testing.assert_array_equal(checkpoint.rows(name, 1, min(7, len(found))), found[1:7], err_msg=name)
        assert checkpoint.notes == folder.notes
        assert checkpoint.config["model_type"] == "qwen3_5_text"
        text = "hello नमस्ते สวัสดี مرحبا"
        ours, theirs = (Tokenizer.from_buffer(each.tokenizer_json()) for each in (checkpoint, folder))
        assert ours.encode(text).ids == theirs.encode(text).ids


def test_qwen3_5_of_a_gguf_computes_what_that_of_the_folder_does(tmp_path: Path) -> None:
    config = tiny_qwen3_5.text_config(linear_num_value_heads=4, tie_word_embeddings=False)
    tiny.write_folder(tmp_path / "folder", config, dtype="F32")
    tiny.write_gguf(tmp_path / "m.gguf", config, kind=Kind.F32)
    logits = []
    for source in ("folder", "m.gguf"):
        bundle = tmp_path / f"{source}.bundle"
        with open_checkpoint(tmp_path / source) as checkpoint:
            export_bundle(checkpoint, bundle, RECIPES["fp32"], progress=Silent())
        logits.append(Decoder(bundle).append(np.arange(20)))
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-5)
    assert np.abs(logits[0]).max() > 1


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("ssm.group_count", 2, 0, "qwen35.ssm.group_count = 0"),
        ("ssm.group_count", 2, 3, "no multiple of 3 key heads"),
        ("ssm.inner_size", 128, 1 << 30, "wrong shape"),
        ("ssm.time_step_rank", 4, 2, "wrong shape"),
        ("nextn_predict_layers", 1, 99, "both some"),
        ("block_count", 5, 6, "lacks"),
    ],
)
def test_linear_attention_that_does_not_fit(tmp_path: Path, name: str, old: int, new: int, expected: str) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny_qwen3_5.text_config(linear_num_value_heads=4))
    rewrite(path, key(f"qwen35.{name}") + uint32(old), key(f"qwen35.{name}") + uint32(new))
    with pytest.raises(CheckpointError) as caught:
        check(path)
    assert expected in str(caught.value)


def check(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        decoder = architecture_for(checkpoint.config)
        decoder.check({name: info.shape for name, info in checkpoint.tensors.items()})


@pytest.mark.parametrize(("embedding", "head", "kept"), [("Q5_0", "Q8_0", "Q8_0"), ("Q8_0", "Q4_0", "Q8_0")])
def test_one_table_quantized_twice_is_tied_to_its_finer_copy(
    tmp_path: Path, embedding: str, head: str, kept: str
) -> None:
    config = tiny.qwen2_config()
    path = tiny.write_gguf(tmp_path / "m.gguf", config, kind=Kind[embedding], head_kind=Kind[head])
    with open_checkpoint(path) as checkpoint:
        assert "lm_head.weight" not in checkpoint.tensors
        assert checkpoint.tensors["model.embed_tokens.weight"].dtype == kept
        assert checkpoint.config["tie_word_embeddings"] is True
        assert kept in checkpoint.notes[0]


def test_two_different_tables_stay_two(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.qwen2_config(tie_word_embeddings=False))
    with open_checkpoint(path) as checkpoint:
        assert "lm_head.weight" in checkpoint.tensors
        assert checkpoint.config["tie_word_embeddings"] is False
        assert checkpoint.notes == ()


def test_sampling_comes_from_the_catalog_else_from_the_family(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.qwen3_config())
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.generation.temperature, checkpoint.generation.top_p) == (0.6, 0.95)
    with open_checkpoint(path, origin=Origin("catalog", "qwen2.5-coder-0.5b-instruct")) as checkpoint:
        assert checkpoint.generation.repetition_penalty == 1.1
        assert checkpoint.generation.do_sample


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Qwen2.5 Coder 0.5B Instruct AWQ", "qwen2.5-coder-0.5b-instruct"),
        ("Qwen3-4B-Instruct-2507", "qwen3-4b-instruct-2507"),
        ("Qwen3 4B", "qwen3-4b"),
        ("Qwen3 4Bx", None),
        ("", None),
    ],
)
def test_titles_name_catalog_entries(title: str, name: str | None) -> None:
    entry = find_by_title(title)
    assert (entry.name if entry else None) == name


def test_the_known_template_defect_is_repaired_and_nothing_else() -> None:
    # As the template spells it: inside a Jinja string with escaped quotes.
    broken = (
        r'{{- "<tool_call>\n{{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>" }}{{ x }}'
    )
    fixed = r'{{- "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}{{ x }}'
    template, notes = repair_template(broken)
    assert template == fixed
    assert len(notes) == 1
    assert repair_template(fixed) == (fixed, [])


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1, old
    path.write_bytes(content.replace(old, new))


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def string(value: str) -> bytes:
    return struct.pack("<I", 8) + key(value)


def uint32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def float32(value: float) -> bytes:
    return struct.pack("<If", 6, value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny.write_gguf(tmp_path / "m.gguf", tiny.qwen2_config())


def test_every_truncation_is_one_line(path: Path) -> None:
    content = path.read_bytes()
    for size in (*range(0, 300, 7), *range(300, len(content), len(content) // 40), len(content) - 1):
        path.write_bytes(content[:size])
        fails(path)


@pytest.mark.parametrize(
    ("offset", "new", "expected"),
    [
        (0, b"GGML", "is no GGUF file"),
        (4, struct.pack("<I", 1), "GGUF version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 60), "tensors and"),
        (16, struct.pack("<Q", 1 << 60), "tensors and"),
        (24, struct.pack("<Q", 1 << 60), "is truncated"),
    ],
)
def test_headers_that_lie(path: Path, offset: int, new: bytes, expected: str) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(new)] = new
    path.write_bytes(content)
    assert expected in fails(path)


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("general.architecture", string("qwen2"), string("llama"), "architecture 'llama'"),
        ("tokenizer.ggml.model", string("gpt2"), string("bert"), "tokenizer of kind 'bert'"),
        ("tokenizer.ggml.pre", string("qwen2"), string("qwenX"), "'qwenX'"),
        ("qwen2.block_count", uint32(2), uint32(0), "qwen2.block_count = 0"),
        ("qwen2.block_count", uint32(2), float32(2.0), "qwen2.block_count = 2.0"),
    ],
)
def test_metadata_that_does_not_fit(path: Path, name: str, old: bytes, new: bytes, expected: str) -> None:
    rewrite(path, key(name) + old, key(name) + new)
    assert expected in fails(path)


def test_token_array_that_lies_about_its_length(path: Path) -> None:
    start = key("tokenizer.ggml.tokens") + struct.pack("<II", 9, 8)
    rewrite(path, start + struct.pack("<Q", 288), start + struct.pack("<Q", 1 << 50))
    assert "claims" in fails(path)


@pytest.mark.parametrize(
    ("kind", "offset", "expected"),
    [
        (99, 0, "'output_norm.weight' as the unknown type 99"),
        (0, 1 << 40, "truncated: tensor 'output_norm.weight'"),
        (0, 1, "'output_norm.weight' at byte 1, which is not aligned"),
        (0, 0, "over the one before"),
        (12, 0, "'output_norm.weight' the shape [64], impossible for Q4_K"),
        (26, None, "no reader for I32 ('output_norm.weight')"),
    ],
)
def test_tensor_table_that_lies(path: Path, kind: int, offset: int | None, expected: str) -> None:
    start = key("output_norm.weight") + struct.pack("<IQ", 1, 64)
    content = path.read_bytes()
    place = content.index(start) + len(start)
    if offset is None:
        offset = struct.unpack_from("<Q", content, place + 4)[0]
    path.write_bytes(content[:place] + struct.pack("<IQ", kind, offset) + content[place + 12 :])
    assert expected in fails(path)


class TestParts:
    """A file that is split, as llama.cpp names and numbers the parts."""

    @pytest.fixture
    def parts(self, tmp_path: Path) -> list[Path]:
        tiny.write_gguf(tmp_path / "m.gguf", tiny.qwen3_config(), kind=Kind.F32, split_max_tensors=10)
        found = sorted(tmp_path.glob("m-*.gguf"))
        assert [path.name for path in found] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
        return found

    def test_any_part_opens_the_whole(self, parts: list[Path], tmp_path: Path) -> None:
        folder = tiny.write_folder(tmp_path / "folder", tiny.qwen3_config())
        for part in parts:
            with open_checkpoint(folder) as expected, open_checkpoint(part) as checkpoint:
                same_tensors(expected, checkpoint)
                source = checkpoint.hash_files()
                assert (source.location, list(source.sha256)) == ("m.gguf", [path.name for path in parts])

    def test_a_part_that_is_missing(self, parts: list[Path]) -> None:
        parts[1].unlink()
        assert "m-00002-of-00003.gguf is missing" in fails(parts[0])

    def test_a_part_twice(self, parts: list[Path]) -> None:
        parts[2].write_bytes(parts[1].read_bytes())
        assert "m-00003-of-00003.gguf says that it is part 1 of 3" in fails(parts[0])

    def test_a_part_of_another_model(self, parts: list[Path], tmp_path: Path) -> None:
        other = tiny.qwen3_config(num_hidden_layers=3)
        tiny.write_gguf(tmp_path / "o.gguf", other, kind=Kind.F32, split_max_tensors=16)
        (tmp_path / "o-00003-of-00003.gguf").replace(parts[2])
        assert "the parts of m.gguf hold 23 tensors, not 24" in fails(parts[0])

    @pytest.mark.parametrize("count", ["00000", "99999"])
    def test_numbers_of_parts_that_lie(self, parts: list[Path], count: str) -> None:
        assert "claims to be one of" in fails(parts[0].rename(parts[0].with_name(f"m-00001-of-{count}.gguf")))

    def test_a_whole_file_that_is_named_like_a_part(self, tmp_path: Path) -> None:
        path = tiny.write_gguf(tmp_path / "m-00001-of-00001.gguf", tiny.qwen2_config())
        assert "says that it is part None of None" in fails(path)


@pytest.fixture(scope="module")
def demo() -> Any:
    try:
        resolved = resolve("qwen2.5-coder-0.5b-instruct", cache=default_cache(), offline=True)
    except CheckpointError:
        pytest.skip("the demo checkpoint is not in the cache (make model)")
    with resolved.open() as checkpoint:
        yield checkpoint


@pytest.mark.model
def test_the_demo_tokenizer_gives_the_official_ids(demo: Checkpoint) -> None:
    tokenizer = Tokenizer.from_buffer(demo.tokenizer_json())
    cases = json.loads((DATA / "qwen_token_ids.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 200
    wrong = [text for text, ids in cases if tokenizer.encode(text).ids != ids]
    assert wrong == []
    assert demo.vocab_ids() == 151_665


@pytest.mark.model
def test_the_demo_is_tied_to_its_finer_table(demo: Checkpoint) -> None:
    assert demo.tensors["model.embed_tokens.weight"].dtype == "Q8_0"
    assert demo.config["tie_word_embeddings"] is True
    assert demo.generation.eos_token_ids == (151645, 151643)
    assert sum(int(np.prod(info.shape)) for info in demo.tensors.values()) == 494_032_768
