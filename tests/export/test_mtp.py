"""The head of multi-token prediction: what its graph computes, and a bundle with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import edge.cli
from edge.bundle import GRAPH, MANIFEST, KVLayout, verify_bundle
from edge.engine.engine import Engine
from edge.errors import CheckpointError, ConfigError, ExportError, QwedgeError
from edge.planning.graph_file import read_shape
from export.architectures.mtp import DRAFT_HIDDEN_STATES
from export.build import build_graph
from export.checkpoint import Checkpoint, open_checkpoint
from export.graph import HIDDEN_STATES, present_name
from export.mtp import MTP_GRAPH, MTP_WEIGHTS, build_mtp, multi_token_prediction, share_right
from export.oracle import Decoder
from export.pipeline import Report, export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES, Recipe
from export.report import Windows
from export.segments import hidden_states
from tests.export import peft, tiny, tiny_qwen3_5
from tests.export.mtp_reference import Reference
from tests.oracle import golden_qwen3_5 as golden

TOLERANCE = 5e-4
"""Absolute, for a logit; the largest are about 4."""
SCHEDULES: dict[str, list[int]] = {"prefill": [71], "decode": [1] * 71, "chunked": [7, 1, 30, 2, 30, 1]}
Array = NDArray[np.float32]


class Head:
    """The head's graph as plain onnxruntime runs it: no shared buffers."""

    def __init__(self, folder: Path, batch: int = 1) -> None:
        self._session = ort.InferenceSession(folder / MTP_GRAPH, providers=["CPUExecutionProvider"])
        pasts = [value for value in self._session.get_inputs() if value.name.startswith("past")]
        self._cache = {value.name: np.zeros([batch, value.shape[1], 0, value.shape[3]], np.float32) for value in pasts}
        self._past = 0

    def append(self, ids: NDArray[np.int64], hidden: Array) -> tuple[Array, Array]:
        """Append positions [batch, n]; returns logits [batch, n, padded_vocab] and hidden states [batch, n, hidden]."""
        total = self._past + ids.shape[1]
        inputs = {
            "input_ids": ids,
            HIDDEN_STATES: hidden,
            "seqlens_k": np.full(len(ids), total - 1, np.int32),
            "total_sequence_length": np.array(total, np.int32),
            "logits_indices": np.arange(ids.size, dtype=np.int64),
        }
        names = ["logits", DRAFT_HIDDEN_STATES, *map(present_name, self._cache)]
        logits, hidden, *presents = self._session.run(names, {**inputs, **self._cache})
        self._cache, self._past = dict(zip(self._cache, presents, strict=True)), total
        return logits.reshape(*ids.shape, -1), hidden


def open_tiny(folder: Path, config: dict[str, Any]) -> Checkpoint:
    return open_checkpoint(tiny.write_folder(folder, config, seed=golden.SEED))


def build_both(checkpoint: Checkpoint, folder: Path, recipe: Recipe) -> Path:
    """The graphs of a model and its head in a new folder."""
    folder.mkdir()
    graph = build_graph(checkpoint, folder, recipe, progress=Silent())
    head = multi_token_prediction(checkpoint)
    build_mtp(head, graph, checkpoint, folder, progress=Silent())
    return folder


Built = tuple[Path, Reference, Array]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Builds the graphs of a case: their folder, the head's reference, and hidden states [prompts, 71, hidden]."""

    @cache
    def built(case: str) -> Built:
        scratch = tmp_path_factory.mktemp(case)
        config = tiny_qwen3_5.config(**golden.CASES[case])
        with open_tiny(scratch / "checkpoint", config) as checkpoint:
            folder = build_both(checkpoint, scratch / "graphs", RECIPES["fp32"])
        model = ir.load(folder / GRAPH)
        hidden = [hidden_states(model, folder, row[:-1].tolist()) for row in golden.prompts()]
        return folder, Reference(config, tiny.random_tensors(config, golden.SEED)), np.concatenate(hidden)

    return built


@pytest.mark.parametrize("case", golden.CASES)
class TestParity:
    """The fp32 graph against the reference, at the hidden states of the model itself."""

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_one_sequence(self, case: str, schedule: str, build: Callable[[str], Built]) -> None:
        folder, reference, hidden = build(case)
        head, ids = Head(folder), golden.prompts()[:1, 1:]
        starts = np.cumsum([0, *SCHEDULES[schedule]])
        assert starts[-1] == ids.shape[1]
        parts = [head.append(ids[:, a:b], hidden[:1, a:b]) for a, b in pairwise(starts)]
        logits, drafted = (np.concatenate(each, axis=1)[0] for each in zip(*parts, strict=True))
        self.check((logits, drafted), reference.run(ids[0], hidden[0]))

    def test_a_batch(self, case: str, build: Callable[[str], Built]) -> None:
        """Rows of one prompt length, then steps of one token each."""
        folder, reference, hidden = build(case)
        ids = golden.prompts()[:, 1:]
        head = Head(folder, len(ids))
        starts = np.cumsum([0, 40, *[1] * 31])
        parts = [head.append(ids[:, a:b], hidden[:, a:b]) for a, b in pairwise(starts)]
        logits, drafted = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        for row in range(len(ids)):
            self.check((logits[row], drafted[row]), reference.run(ids[row], hidden[row]))

    def test_its_own_hidden_state_goes_in_again(self, case: str, build: Callable[[str], Built]) -> None:
        """Five further guesses, each from the one before."""
        folder, reference, hidden = build(case)
        head, ids, x = Head(folder), golden.prompts()[:1, 1:21], hidden[:1, :20]
        logits, drafted = head.append(ids, x)
        for _ in range(5):
            ids = np.append(ids, [[logits[0, -1].argmax()]], axis=1)
            x = np.append(x, drafted[:, -1:], axis=1)
            logits, drafted = head.append(ids[:, -1:], x[:, -1:])
        expected, _ = reference.run(ids[0], x[0])
        assert np.abs(logits[0] - expected[-1:]).max() < TOLERANCE

    def check(self, found: tuple[Array, Array], expected: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
        for ours, theirs in zip(found, expected, strict=True):
            difference = np.abs(ours - theirs).max()
            assert difference < TOLERANCE
            assert difference < TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize(("recipe", "tied"), [("balanced", True), ("balanced", False), ("small", True)])
class TestQuantized:
    @pytest.fixture
    def folders(self, recipe: str, tied: bool, tmp_path: Path) -> list[Path]:
        """Graphs of a recipe, with kernels that take float32; and with the values of its codes stored as float32."""
        quantized = replace(RECIPES[recipe], accuracy_level=0)
        recipes = (quantized, replace(quantized, dequantize=True))
        with open_tiny(tmp_path / "m", tiny_qwen3_5.config(tie_word_embeddings=tied)) as checkpoint:
            return [build_both(checkpoint, tmp_path / str(each.dequantize), each) for each in recipes]

    def test_it_computes_what_its_codes_say(self, folders: list[Path]) -> None:
        hidden = np.random.default_rng(5).normal(size=(1, 9, 64)).astype(np.float32)
        found, expected = (Head(folder).append(golden.prompts()[:1, :9], hidden) for folder in folders)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(np.abs(theirs).max()))

    def test_the_tables_stand_in_the_models_data_file_alone(self, folders: list[Path], tied: bool) -> None:
        places = {name: external_places(folders[0] / name) for name in (GRAPH, MTP_GRAPH)}
        tables = {name: place for name, place in places[MTP_GRAPH].items() if name.startswith(("embed", "lm_head"))}
        assert {name.split(".")[0] for name in tables} == ({"embed"} if tied else {"embed", "lm_head"})
        assert tables.items() <= places[GRAPH].items()
        assert {place[0] for name, place in places[MTP_GRAPH].items() if name not in tables} == {MTP_WEIGHTS}


def external_places(graph: Path) -> dict[str, tuple[Any, ...]]:
    """File, offset and length of each initializer that is not in the graph itself."""
    tensors = [value.const_value for value in ir.load(graph).graph.initializers.values()]
    external = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    return {str(each.name): (each.location, each.offset, each.length) for each in external}


def test_the_reference_tells_what_is_wrong(build: Callable[[str], Built]) -> None:
    """Another token, another hidden state, or halves of fc the other way round show in the logits."""
    _, reference, hidden = build("equal-heads")
    ids = golden.prompts()[0, 1:]
    expected, _ = reference.run(ids, hidden[0])
    others = [reference.run(golden.prompts()[0, :-1], hidden[0]), reference.run(ids, hidden[1])]
    name = "mtp.fc.weight"
    swapped = reference._tensors | {name: np.roll(reference._tensors[name], hidden.shape[-1], axis=1)}
    reference_of_swapped = Reference(reference._text, swapped)
    for logits, _ in [*others, reference_of_swapped.run(ids, hidden[0])]:
        assert np.abs(logits - expected).max() > 0.1


def export(source: Path, output: Path, recipe: str = "balanced", **options: Any) -> Report:
    with open_checkpoint(source) as checkpoint:
        return export_bundle(checkpoint, output, RECIPES[recipe], **{"progress": Silent(), "mtp": True, **options})


def write_tiny(folder: Path, **changes: Any) -> Path:
    return tiny.write_folder(folder / "Tiny", tiny_qwen3_5.config(linear_num_value_heads=4, **changes))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """Exports the tiny model once for each recipe, with its head or without."""
    folder = tmp_path_factory.mktemp("exported")
    source = write_tiny(folder)

    @cache
    def once(recipe: str, mtp: bool) -> Report:
        return export(source, folder / f"{recipe}-{mtp}", recipe, mtp=mtp)

    return lambda recipe, mtp=True: once(recipe, mtp)


def files(report: Report) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in report.folder.iterdir()}


class TestBundle:
    @pytest.mark.parametrize("recipe", ["balanced", "fp32"])
    def test_the_models_own_files_stay_as_they_are(self, recipe: str, exported: Callable[..., Report]) -> None:
        with_head, without = exported(recipe), exported(recipe, mtp=False)
        assert verify_bundle(with_head.folder) == with_head.manifest
        found, fewer = files(with_head), files(without)
        assert found.keys() - fewer.keys() == {MTP_GRAPH, MTP_WEIGHTS}
        assert [name for name in fewer if found[name] != fewer[name]] == [MANIFEST]

    def test_the_manifest_has_no_other_fields_than_without_it(self, exported: Callable[..., Report]) -> None:
        """Runtimes that know of no such head refuse fields that they do not know."""
        with_head, without = (json.loads(files(exported("balanced", mtp=mtp))[MANIFEST]) for mtp in (True, False))
        assert with_head.keys() == without.keys()
        assert with_head["min_runtime_version"] == without["min_runtime_version"]
        assert with_head["recipe"].keys() - without["recipe"].keys() == {"mtp"}

    def test_what_the_manifest_says_of_it(self, exported: Callable[..., Report]) -> None:
        manifest = exported("fp32").manifest
        tensors = tiny.random_tensors(tiny_qwen3_5.config(linear_num_value_heads=4))
        head = [each for name, each in tensors.items() if name.startswith("mtp.")]
        table = tensors["model.language_model.embed_tokens.weight"]
        assert manifest.recipe["mtp"] == {
            "kv": KVLayout(layers=1, kv_heads=2, head_dim=64).model_dump(),
            "parameter_count": sum(each.size for each in head),
            "weight_bytes_per_token": sum(each.nbytes for each in (*head, table) if each.ndim == 2),
        }
        assert manifest.measured["mtp"]["chunked_difference"] < 1e-5
        assert manifest.measured["mtp"]["kernel_difference"] == 0
        assert 0 < exported("balanced").manifest.measured["mtp"]["kernel_difference"] <= 1e-5

    def test_the_self_test_guesses_as_the_whole_graph_does(self, exported: Callable[..., Report]) -> None:
        report = exported("fp32")
        test = report.manifest.measured["self_test"]
        ids = np.array([[*test["prompt_ids"][1:], test["next_id"]]], np.int64)
        hidden = hidden_states(ir.load(report.folder / GRAPH), report.folder, test["prompt_ids"])
        logits, _ = Head(report.folder).append(ids, hidden)
        assert report.manifest.measured["mtp"]["next_id"] == int(logits[0, -1].argmax())

    def test_another_export_is_byte_identical(self, exported: Callable[..., Report], tmp_path: Path) -> None:
        assert files(export(write_tiny(tmp_path), tmp_path / "again")) == files(exported("balanced"))

    def test_the_runtime_leaves_it_alone(self, exported: Callable[..., Report]) -> None:
        with_head, without = (exported("balanced", mtp=mtp) for mtp in (True, False))
        engine = Engine(with_head.folder, with_head.manifest, slots=1, context=32, threads=1)
        assert engine.prefill(0, golden.prompts()[0, :9], 0).shape == (288,)
        assert MTP_WEIGHTS not in Path("/proc/self/maps").read_text()
        shapes = [read_shape(each.folder, each.manifest) for each in (with_head, without)]
        assert shapes[0] == replace(shapes[1], disk_bytes=shapes[0].disk_bytes)

    def test_adapters_and_an_int8_cache_are_the_models_alone(self, tmp_path: Path) -> None:
        weights = tiny.random_tensors(tiny_qwen3_5.text_config(linear_num_value_heads=4))
        shapes = {name: each.shape for name, each in weights.items() if "model.layers.3.self_attn.q_proj" in name}
        adapter = peft.write_adapter(tmp_path / "adapter", peft.adapter_tensors(shapes, 4, targets={"q_proj"}))
        report = export(write_tiny(tmp_path), tmp_path / "bundle", kv="int8", adapters={"a": adapter})
        head = {str(value.name): str(value.dtype) for value in ir.load(report.folder / MTP_GRAPH).graph.inputs}
        assert not any(name.startswith("lora.") for name in head)
        assert head["past_key_values.0.key"] == "FLOAT"
        assert report.manifest.recipe["mtp"]["kv"]["dtype"] == "float32"
        assert report.manifest.kv.dtype == "int8"

    def test_a_gguf_gives_the_same(self, exported: Callable[..., Report], tmp_path: Path) -> None:
        config = tiny_qwen3_5.text_config(linear_num_value_heads=4)
        path = tiny.write_gguf(tmp_path / "m.gguf", config, kind=gguf.GGMLQuantizationType.F32)
        from_gguf, from_folder = export(path, tmp_path / "bundle", "fp32"), exported("fp32")
        assert from_gguf.manifest.recipe["mtp"] == from_folder.manifest.recipe["mtp"]
        hidden = np.random.default_rng(5).normal(size=(1, 9, 64)).astype(np.float32)
        ids = golden.prompts()[:1, :9]
        found, expected = (Head(each.folder).append(ids, hidden) for each in (from_gguf, from_folder))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_how_often_a_guess_is_right(tmp_path: Path) -> None:
    """Only one channel of what goes into the output table is left, so that model and head choose among two tokens."""
    config = tiny_qwen3_5.config()
    tensors = tiny.random_tensors(config)
    for name in ("model.language_model.norm.weight", "mtp.norm.weight"):
        tensors[name][1:] = -1.0
    source = tiny.write_folder(tmp_path / "m", config)
    tiny.write_safetensors(source / "model.safetensors", tensors, "F32")
    with open_checkpoint(source) as checkpoint:
        folder = build_both(checkpoint, tmp_path / "graphs", RECIPES["fp32"])
    graphs = ir.load(folder / MTP_GRAPH), ir.load(folder / GRAPH)
    windows = Windows(golden.prompts())
    right = []
    for ids in golden.prompts():
        guessed, _ = Head(folder).append(ids[None, 1:], hidden_states(graphs[1], folder, ids[:-1].tolist()))
        chosen = Decoder(folder).append(ids)
        right += [chosen[place].argmax() == guessed[0, place - 1].argmax() for place in range(36, 71)]
    assert 0.2 < np.mean(right) < 0.8
    assert share_right(*graphs, folder, windows) == pytest.approx(np.mean(right))


class TestRefusals:
    @pytest.fixture(autouse=True)
    def nothing_left(self, tmp_path: Path) -> Iterator[None]:
        yield
        assert not (tmp_path / "bundle").exists()
        assert not list(tmp_path.glob(".bundle*"))

    def refused(self, source: Path, tmp_path: Path, kind: type[QwedgeError], match: str) -> None:
        with pytest.raises(kind, match=match) as caught:
            export(source, tmp_path / "bundle")
        assert "--mtp" in caught.value.hint or kind is ExportError

    def test_another_family(self, tmp_path: Path) -> None:
        source = tiny.write_folder(tmp_path / "m", tiny.qwen3_config())
        self.refused(source, tmp_path, ConfigError, "only Qwen3.5 has one")

    def test_a_checkpoint_without_it(self, tmp_path: Path) -> None:
        source = self.change(tiny.write_folder(tmp_path / "m", tiny_qwen3_5.config()), "mtp.", None)
        self.refused(source, tmp_path, ConfigError, "this checkpoint holds none")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"mtp_num_hidden_layers": 2}, "with 2 layers is not supported"),
            ({"mtp_use_dedicated_embeddings": True}, "embeddings of its own"),
        ],
    )
    def test_another_kind(self, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
        source = tiny.write_folder(tmp_path / "m", tiny_qwen3_5.config(**changes))
        self.refused(source, tmp_path, CheckpointError, match)

    @pytest.mark.parametrize(
        ("name", "value", "match"),
        [
            ("mtp.fc.weight", None, r"lacks mtp\.fc\.weight"),
            ("mtp.norm.weight", np.zeros(63, np.float32), r"mtp\.norm\.weight is \[63\] instead of \[64\]"),
            ("mtp.lm_head.weight", np.zeros((4, 4), np.float32), r"no place in the model: mtp\.lm_head\.weight"),
        ],
    )
    def test_other_tensors(self, name: str, value: Any, match: str, tmp_path: Path) -> None:
        source = self.change(tiny.write_folder(tmp_path / "m", tiny_qwen3_5.config()), name, value)
        self.refused(source, tmp_path, CheckpointError, match)

    def test_numbers_that_are_none(self, tmp_path: Path) -> None:
        source = self.change(write_tiny(tmp_path), "mtp.fc.weight", np.full((64, 128), np.nan, np.float32))
        self.refused(source, tmp_path, ExportError, r"mtp\.fc\.weight holds NaN")

    def change(self, source: Path, start: str, value: Any) -> Path:
        """Put a tensor into a checkpoint, or take those away whose names start so."""
        tensors = tiny.random_tensors(json.loads((source / "config.json").read_text("utf-8")))
        tensors = {name: each for name, each in tensors.items() if not name.startswith(start)}
        tensors |= {} if value is None else {start: value}
        tiny.write_safetensors(source / "model.safetensors", tensors, "F32")
        return source


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["export", str(write_tiny(tmp_path)), "--offline", "--mtp", "-o", str(tmp_path / "bundle")]
    measured = ["--report", str(tmp_path / "report"), "--recipe", "fp32", "--context", "32"]
    assert edge.cli.run([*line, *measured]) == 0
    shown = capsys.readouterr()
    assert re.search(r"^mtp        92,608 parameters, guesses .*, right \d+\.\d% of the time$", shown.out, re.MULTILINE)
    assert "are skipped: --mtp" not in shown.err
