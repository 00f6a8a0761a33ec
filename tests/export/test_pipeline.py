"""The whole export: what a bundle holds, that it is reproducible, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer

from edge.bundle import verify_bundle
from edge.errors import BundleError, CheckpointError, ConfigError, ExportError
from export.build import build_graph
from export.checkpoint import open_checkpoint
from export.oracle import Decoder
from export.pipeline import SELF_TEST_PROMPT, Report, export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from export.verify import self_test
from tests.export import tiny, tiny_qwen3_5

FILES = {"chat_template.jinja", "generation.json", "model.onnx", "model.onnx.data", "tokenizer.json"}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write_folder(tmp_path / "Tiny Model v1.0", tiny.qwen2_config())


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder of its own for the bundle, so that what is left behind shows."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


def export(source: Path, output: Path, recipe: str = "balanced", **options: Any) -> Report:
    with open_checkpoint(source) as checkpoint:
        return export_bundle(checkpoint, output, RECIPES[recipe], **{"progress": Silent(), **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_tensors(folder: Path, values: dict[str, float]) -> None:
    """Fill whole tensors of a written checkpoint with one value."""
    tensors = tiny.random_tensors(json.loads((folder / "config.json").read_text()))
    for name, value in values.items():
        tensors[name][:] = value
    tiny.write_safetensors(folder / "model.safetensors", tensors, "F32")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bundle_holds_what_its_manifest_says(source: Path, output: Path, recipe: str) -> None:
    oracle = {"oracle": "transformers", "max_difference": 1e-6}
    report = export(source, output, recipe, licence="apache-2.0", oracle=oracle)
    manifest = verify_bundle(output)
    assert manifest == report.manifest
    assert contents(output).keys() == FILES | {"manifest.json"}
    assert {entry.path for entry in manifest.files} == FILES
    assert (manifest.name, manifest.model_type, manifest.licence) == ("tiny-model-v1.0", "qwen2", "apache-2.0")
    fitted = RECIPES[recipe].fitted(manifest.hidden_size, is_calibrated=False)
    assert manifest.recipe == fitted.describe() | {"calibration": None}
    assert manifest.parameter_count == sum(each.size for each in tiny.random_tensors(tiny.qwen2_config()).values())
    assert (manifest.context_length, manifest.vocab_size, manifest.padded_vocab_size) == (256, tiny.NUM_IDS, 288)
    assert manifest.kv.model_dump() == {"layers": 2, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
    assert (manifest.source.kind, manifest.source.location) == ("folder", "Tiny Model v1.0")
    assert "model.safetensors" in manifest.source.sha256
    assert manifest.measured["oracle"] == oracle
    assert report.seconds.keys() == {"quantize", "verify", "hash"}
    assert str(source.parent) not in (output / "manifest.json").read_text()


def test_the_text_side_comes_along(source: Path, output: Path) -> None:
    export(source, output)
    assert (output / "tokenizer.json").read_bytes() == tiny.tokenizer_json()
    assert (output / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE
    assert json.loads((output / "generation.json").read_text()) == {
        "eos_token_ids": [tiny.EOS, tiny.BOS],
        "bos_token_id": tiny.BOS,
        "pad_token_id": tiny.BOS,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "do_sample": True,
    }


def test_bytes_per_token_are_those_of_all_matrices(source: Path, output: Path) -> None:
    """Float32: every weight but vectors and the embedding is read once; tied, so the head is the table."""
    manifest = export(source, output, "fp32").manifest
    tensors = tiny.random_tensors(tiny.qwen2_config())
    assert manifest.weight_bytes_per_token == sum(each.nbytes for each in tensors.values() if each.ndim == 2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_exports_are_byte_identical(source: Path, output: Path, recipe: str) -> None:
    export(source, output, recipe)
    export(source, output.with_name("again"), recipe)
    assert contents(output) == contents(output.with_name("again"))


def test_shards_change_the_source_and_nothing_else(source: Path, output: Path, tmp_path: Path) -> None:
    sharded = tiny.write_folder(tmp_path / "sharded", tiny.qwen2_config(), num_shards=3)
    export(source, output)
    export(sharded, output.with_name("sharded"))
    first, second = contents(output), contents(output.with_name("sharded"))
    assert {name: first[name] for name in FILES} == {name: second[name] for name in FILES}
    assert first["manifest.json"] != second["manifest.json"]


@pytest.mark.parametrize(
    "config", [tiny.qwen2_config(), tiny.qwen3_config(tie_word_embeddings=False), tiny_qwen3_5.config()]
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_self_test_says_what_the_whole_graph_says(config: dict[str, Any], recipe: str, tmp_path: Path) -> None:
    """It runs the graph layer by layer: cut and joined, that must be the same."""
    source = tiny.write_folder(tmp_path / "source", config)
    with open_checkpoint(source) as checkpoint:
        graph = build_graph(checkpoint, tmp_path, RECIPES[recipe], progress=Silent())
    ids = Tokenizer.from_buffer(tiny.tokenizer_json()).encode(SELF_TEST_PROMPT).ids
    tested = self_test(graph.model, tmp_path, ids)
    logits = Decoder(tmp_path).append(np.array(ids, np.int64))
    assert tested.prompt_ids == ids
    assert tested.next_id == int(logits[-1].argmax())
    assert tested.chunked_difference < (1e-5 if recipe == "fp32" else 0.05)


def test_what_was_measured_is_in_the_manifest(source: Path, output: Path) -> None:
    measured = export(source, output).manifest.measured["self_test"]
    assert 0 < measured["kernel_difference"] <= 1e-5
    assert measured["prompt"] == SELF_TEST_PROMPT
    assert Tokenizer.from_file(str(output / "tokenizer.json")).decode([measured["next_id"]]) == measured["next_text"]


class TestNameContextAndPlace:
    @pytest.mark.parametrize(
        ("folder", "name"),
        [
            ("Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b-instruct"),
            ("_x y_", "x-y"),
            ("模型", "model"),
            ("A" * 120, "a" * 80),
        ],
    )
    def test_a_name_is_made_from_the_source(self, folder: str, name: str, output: Path, tmp_path: Path) -> None:
        source = tiny.write_folder(tmp_path / "sources" / folder, tiny.qwen2_config())
        assert export(source, output).manifest.name == name

    def test_the_given_name_wins(self, source: Path, output: Path) -> None:
        assert export(source, output, name="plant-7.v2").manifest.name == "plant-7.v2"

    @pytest.mark.parametrize("name", ["", "Tiny", "a b", "../x", "-x", ".x", "ä", "x" * 97])
    def test_a_name_that_requests_could_not_use(self, source: Path, output: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="cannot be a model name"):
            export(source, output, name=name)
        assert list(output.parent.iterdir()) == []

    def test_context(self, tmp_path: Path, output: Path) -> None:
        source = tiny.write_folder(tmp_path / "long", tiny.qwen2_config(max_position_embeddings=40_960))
        assert export(source, output).manifest.context_length == 32_768
        assert export(source, output.with_name("short"), context=100).manifest.context_length == 100
        for context in (0, -1, 40_961):
            with pytest.raises(ConfigError, match="out of range"):
                export(source, output.with_name("none"), context=context)

    def test_an_empty_folder_is_taken(self, source: Path, output: Path) -> None:
        output.mkdir()
        export(source, output)
        assert verify_bundle(output)

    def test_the_current_folder_is_taken(self, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        output.mkdir()
        monkeypatch.chdir(output)
        export(source, Path())
        assert verify_bundle(output)

    def test_missing_parents_are_made(self, source: Path, output: Path) -> None:
        export(source, output / "deeper" / "still")
        assert verify_bundle(output / "deeper" / "still")

    @pytest.mark.parametrize("kind", ["file", "folder", "bundle"])
    def test_nothing_is_overwritten(self, source: Path, output: Path, kind: str) -> None:
        if kind == "file":
            output.write_text("mine")
        elif kind == "folder":
            output.mkdir()
            (output / "mine").touch()
        else:
            export(source, output)
        before = sorted(output.parent.rglob("*"))
        with pytest.raises(ConfigError, match="exists already"):
            export(source, output)
        assert sorted(output.parent.rglob("*")) == before

    def test_a_place_that_cannot_be_written(self, source: Path, output: Path) -> None:
        (output.parent / "file").touch()
        with pytest.raises(ConfigError, match="cannot write to"):
            export(source, output.parent / "file" / "bundle")


class Interrupting:
    """Somebody presses Ctrl-C while a step makes progress."""

    def __init__(self, step: str) -> None:
        self._step = step
        self._active = False

    def start(self, label: str, _: int | None) -> None:
        self._active = label == self._step

    def advance(self, _: int) -> None:
        if self._active:
            raise KeyboardInterrupt

    def finish(self) -> None:
        pass


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The system refuses to write longer files, as a full disk refuses (EFBIG instead of ENOSPC)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


class TestFailures:
    """Whatever happens, nothing is left: no bundle, no staging folder, and an empty destination stays empty."""

    @pytest.fixture(autouse=True)
    def nothing_left(self, output: Path) -> Iterator[None]:
        output.mkdir()
        yield
        assert list(output.parent.iterdir()) == [output]
        assert list(output.iterdir()) == []

    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    def test_nan(self, source: Path, output: Path, name: str) -> None:
        change_tensors(source, {name: np.nan})
        with pytest.raises(ExportError, match=f"{name} holds NaN"):
            export(source, output)

    @pytest.mark.parametrize("limit", [100, 8192, 60_000])
    def test_a_disk_that_fills_up(self, source: Path, output: Path, limit: int) -> None:
        with file_size_limit(limit), pytest.raises(ExportError) as caught:
            export(source, output)
        assert caught.value.message == "cannot write the model: File too large"
        assert "disk space" in caught.value.hint

    @pytest.mark.parametrize("place", ["ir.save", "write_text_side", "publish_bundle"])
    def test_a_disk_that_is_full_later(
        self, source: Path, output: Path, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(f"export.pipeline.{place}", full)
        with pytest.raises(ExportError, match="No space left on device"):
            export(source, output)
        # At the last of these places the empty folder had made room for the bundle already.
        output.mkdir(exist_ok=True)

    @pytest.mark.parametrize("step", ["balanced weights", "hashing"])
    def test_ctrl_c(self, source: Path, output: Path, step: str) -> None:
        with pytest.raises(KeyboardInterrupt):
            export(source, output, progress=Interrupting(step))

    def test_activations_that_overflow(self, source: Path, output: Path) -> None:
        change_tensors(source, {"model.layers.1.input_layernorm.weight": 3e38})
        with pytest.raises(ExportError, match="self-test: layer 1 is not finite"):
            export(source, output)

    def test_logits_that_overflow(self, source: Path, output: Path) -> None:
        change_tensors(source, {"model.norm.weight": 3e38})
        with pytest.raises(ExportError, match="self-test: the logits are not finite"):
            export(source, output)

    def test_a_kernel_that_reads_the_codes_differently(
        self, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if the nibbles of an onnxruntime to come stood the other way round."""

        def swapped(packed: Any, bits: int) -> Any:
            pairs = np.stack([packed >> 4, packed & 15], axis=-1)
            return pairs.reshape(*packed.shape[:-1], -1) if bits == 4 else packed

        monkeypatch.setattr("export.quantize.blockwise._unpack", swapped)
        with pytest.raises(ExportError, match="kernel and codes differ"):
            export(source, output)

    def test_a_tokenizer_of_another_model(self, output: Path, tmp_path: Path) -> None:
        source = tiny.write_folder(tmp_path / "small", tiny.qwen2_config(vocab_size=tiny.NUM_IDS - 1))
        with pytest.raises(ExportError, match="more ids than the model"):
            export(source, output)

    def test_weights_that_do_not_belong_to_the_config(self, source: Path, output: Path) -> None:
        tiny.write_json(source / "config.json", tiny.qwen2_config(num_hidden_layers=3))
        with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\."):
            export(source, output)

    def test_a_source_that_shrinks_underway(self, source: Path, output: Path) -> None:
        with open_checkpoint(source) as checkpoint:
            (source / "model.safetensors").write_bytes(b"")
            with pytest.raises(CheckpointError, match="ends at byte"):
                export_bundle(checkpoint, output, RECIPES["balanced"], progress=Silent())


def test_zero_matrices_are_weights_like_others(source: Path, output: Path) -> None:
    change_tensors(source, {f"model.layers.0.mlp.{part}_proj.weight": 0.0 for part in ("gate", "up", "down")})
    export(source, output)
    assert verify_bundle(output)


def test_an_export_that_is_killed_leaves_no_bundle(source: Path, output: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES

class Killer(Silent):
    def start(self, label, total_bytes):
        if label == "hashing":
            os.kill(os.getpid(), signal.SIGKILL)

with open_checkpoint(Path({str(source)!r})) as checkpoint:
    export_bundle(checkpoint, Path({str(output)!r}), RECIPES["balanced"], progress=Killer())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not output.exists()
    (left,) = output.parent.iterdir()
    assert left.name.startswith(".bundle.")
    with pytest.raises(BundleError, match="not a bundle"):
        verify_bundle(left)
    export(source, output)
    assert verify_bundle(output)


def test_a_graph_that_onnxruntime_refuses_to_run(source: Path, tmp_path: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        graph = build_graph(checkpoint, tmp_path, RECIPES["balanced"], progress=Silent())
    node = next(node for node in graph.model.graph if node.op_type == "GroupQueryAttention")
    node.attributes["num_heads"] = ir.AttrInt64("num_heads", 3)
    with pytest.raises(ExportError, match="onnxruntime refuses the graph"):
        self_test(graph.model, tmp_path, [1, 2, 3])
