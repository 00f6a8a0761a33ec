"""Calibration of whole graphs: the text runs through tiny models while they are built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge.bundle import GRAPH, WEIGHTS
from edge.errors import ConfigError
from export.build import Graph, build_graph
from export.calibration import BUILT_IN, LEAST_TOKENS, Calibration, CalibrationText
from export.checkpoint import open_checkpoint
from export.graph import GraphBuilder
from export.progress import Silent
from export.quantize.recipes import RECIPES, Blockwise, Projections, Recipe
from export.segments import Layer, embed, hidden_states, num_layers
from export.verify import head_logits
from tests.export import tiny, tiny_qwen3_5

TEXT = CalibrationText("test", CalibrationText.open(BUILT_IN).text[:4000])
FOUR_BITS = replace(RECIPES["int8"], layer=Projections.all(Blockwise(bits=4, block=32)))
SHAPES = {
    "qwen2": tiny.qwen2_config(),
    "qwen3-untied": tiny.qwen3_config(tie_word_embeddings=False, num_key_value_heads=1),
    "qwen2-odd": tiny.qwen2_config(intermediate_size=80),
    "qwen3_5": tiny_qwen3_5.config(linear_num_value_heads=4),
}


def ids(text: str) -> list[int]:
    return list(Tokenizer.from_buffer(tiny.tokenizer_json()).encode(text).ids)


def build(
    folder: Path, config: dict[str, Any], recipe: Recipe, text: CalibrationText | None, *, lora: bool = False
) -> Graph:
    folder.mkdir()
    with open_checkpoint(tiny.write_folder(folder / "checkpoint", config)) as checkpoint:
        return build_graph(checkpoint, folder, recipe, progress=Silent(), calibration=text, lora=lora)


def hidden(graph: Graph, folder: Path, tokens: list[int]) -> NDArray[np.float32]:
    x = embed(graph.model, folder, tokens)
    for index in range(num_layers(graph.model)):
        x = Layer(graph.model, folder, index).append(x)
    return x


@pytest.mark.parametrize("shape", SHAPES)
def test_a_calibrated_graph_is_nearer_to_the_original_on_another_text(shape: str, tmp_path: Path) -> None:
    tokens = ids(CalibrationText.open(BUILT_IN).text[5000:5240])
    # With one table in all, so that only the layers differ.
    exact = replace(RECIPES["fp32"], table=FOUR_BITS.table, head=FOUR_BITS.head, dequantize=True)
    expected = hidden(build(tmp_path / "exact", SHAPES[shape], exact, None), tmp_path / "exact", tokens)
    errors = []
    for name, text in (("nearest", None), ("calibrated", TEXT)):
        graph = build(tmp_path / name, SHAPES[shape], FOUR_BITS, text)
        errors.append(np.linalg.norm(hidden(graph, tmp_path / name, tokens) - expected))
    assert errors[1] < 0.93 * errors[0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_table_in_four_bits_is_rounded_for_what_goes_into_the_head(tied: bool, tmp_path: Path) -> None:
    config = tiny.qwen2_config(vocab_size=1024, tie_word_embeddings=tied)
    recipe = replace(RECIPES["fp32"], name="x", table=Blockwise(4, 32))
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    exact = tiny.random_tensors(config)[name]
    tokens, errors, sizes = ids(CalibrationText.open(BUILT_IN).text[5000:5240]), [], []
    for folder, text in ((tmp_path / "nearest", None), (tmp_path / "calibrated", TEXT)):
        graph = build(folder, config, recipe, text)
        states = hidden_states(graph.model, folder, tokens)[0]
        errors.append(np.linalg.norm(head_logits(graph.model, folder, states) - states @ exact.T))
        sizes.append((folder / WEIGHTS).stat().st_size)
        found = embed(graph.model, folder, list(range(64)))[0]
        expected = tiny.random_tensors(config)["model.embed_tokens.weight"][:64]
        assert np.linalg.norm(found - expected) < 0.12 * np.linalg.norm(expected)
    assert errors[1] < 0.8 * errors[0]
    assert sizes[0] == sizes[1]


def test_the_same_text_makes_the_same_bytes_and_another_text_makes_others(tmp_path: Path) -> None:
    other = CalibrationText("other", TEXT.text[::-1])
    for name, text in (("first", TEXT), ("second", TEXT), ("other", other)):
        build(tmp_path / name, SHAPES["qwen2"], FOUR_BITS, text)
    for file in (GRAPH, WEIGHTS):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert (tmp_path / "first" / WEIGHTS).read_bytes() != (tmp_path / "other" / WEIGHTS).read_bytes()


def test_places_for_adapters_change_nothing(tmp_path: Path) -> None:
    for name, lora in (("plain", False), ("lora", True)):
        build(tmp_path / name, SHAPES["qwen2"], FOUR_BITS, TEXT, lora=lora)
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (tmp_path / "lora" / WEIGHTS).read_bytes()


@pytest.fixture
def whole_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products make up for all that they lack."""
    monkeypatch.setattr("export.calibration._STRENGTH", np.float32(1))


@pytest.mark.usefixtures("whole_strength")
def test_eight_bits_make_up_for_what_four_bits_before_them_changed(tmp_path: Path) -> None:
    """Without that, matrices in 8 bits would be rounded as they are without a text."""
    four, eight = Blockwise(bits=4, block=32), Blockwise(bits=8, block=32)
    recipe = replace(FOUR_BITS, layer=Projections(qkv=four, out=four, gate_up=four, down=eight))
    tokens = ids(CalibrationText.open(BUILT_IN).text[5000:5240])
    exact = replace(RECIPES["fp32"], table=recipe.table, head=recipe.head, dequantize=True)
    expected = hidden(build(tmp_path / "exact", SHAPES["qwen2"], exact, None), tmp_path / "exact", tokens)
    graph = build(tmp_path / "fitted", SHAPES["qwen2"], recipe, TEXT)
    errors = [np.linalg.norm(hidden(graph, tmp_path / "fitted", tokens) - expected)]
    # The same graph, with every down rounded to nearest.
    nearest = build(tmp_path / "nearest", SHAPES["qwen2"], recipe, None)
    for name, values in _down_parts(graph, tmp_path / "fitted").items():
        values[:] = _down_parts(nearest, tmp_path / "nearest")[name]
        values.flush()
    errors.append(np.linalg.norm(hidden(graph, tmp_path / "fitted", tokens) - expected))
    assert errors[0] < 0.97 * errors[1]


def _down_parts(graph: Graph, folder: Path) -> dict[str, np.memmap[Any, Any]]:
    """Codes, scales and zero points of every down, mapped from the data file."""
    parts = {}
    for name, value in graph.model.graph.initializers.items():
        tensor = value.const_value
        if "down" in name and isinstance(tensor, ir.ExternalTensor):
            shape = (tensor.length or 0,)
            parts[name] = np.memmap(folder / WEIGHTS, np.uint8, "r+", tensor.offset or 0, shape)
    return parts


@pytest.mark.usefixtures("whole_strength")
def test_a_text_helps_eight_bits_too(tmp_path: Path) -> None:
    tokens = ids(CalibrationText.open(BUILT_IN).text[5000:5240])
    errors = []
    exact = replace(RECIPES["fp32"], table=RECIPES["int8"].table, dequantize=True)
    expected = hidden(build(tmp_path / "exact", SHAPES["qwen2"], exact, None), tmp_path / "exact", tokens)
    for name, text in (("nearest", None), ("calibrated", TEXT)):
        graph = build(tmp_path / name, SHAPES["qwen2"], RECIPES["int8"], text)
        errors.append(np.linalg.norm(hidden(graph, tmp_path / name, tokens) - expected))
    assert errors[1] < 0.9 * errors[0]


def test_nothing_but_the_graph_stays_in_its_folder(tmp_path: Path) -> None:
    build(tmp_path / "graph", SHAPES["qwen2"], FOUR_BITS, TEXT)
    assert sorted(path.name for path in (tmp_path / "graph").iterdir()) == ["checkpoint", GRAPH, WEIGHTS]


@pytest.mark.parametrize(
    ("hidden_size", "text", "query_key", "down"),
    [
        (1024, None, 4, [4, 4, 4, 4]),
        (1024, TEXT, 4, [4, 4, 4, 4]),
        (992, None, 8, [8, 4, 4, 8]),
        (992, TEXT, 8, [8, 8, 8, 8]),
    ],
)
def test_narrow_models_get_more_bits_and_more_of_them_where_weights_are_calibrated(
    tmp_path: Path, hidden_size: int, text: CalibrationText | None, query_key: int, down: list[int]
) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = tiny.qwen3_config(hidden_size=hidden_size, num_hidden_layers=4, intermediate_size=64, **heads)
    graph = build(tmp_path / "graph", config, RECIPES["balanced"], text)
    bits: dict[str, list[int]] = {}
    for node in graph.model.graph:
        if node.op_type == "MatMulNBits" and node.inputs[1] is not None:
            name = str(node.inputs[1].name).split(".")[-2]
            bits.setdefault(name, []).append(node.attributes["bits"].as_int())
    attention = {"qkv_proj": [8] * 4} if query_key == 8 else {"qk_proj": [4] * 4, "v_proj": [8] * 4}
    layer = {"gate_up_proj": [4] * 4, "o_proj": [8] * 4, "down_proj": down}
    assert bits == attention | layer | {"upper": [4], "correction": [4]}
    # The manifest tells what was built, not what other models would get.
    described = graph.recipe.describe()["layer"]
    assert described["down"]["bits"] == down[1]
    assert described.get("outer_down", described["down"])["bits"] == down[0]
    assert ("query_key" in described) == (query_key == 4)


def test_every_product_is_observed_with_the_inputs_that_the_finished_graph_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states that calibration carries along are those of the layers as they were quantized."""
    carried: list[NDArray[np.float32]] = []

    class Watched(Calibration):
        def observe(self, graph: GraphBuilder, x: Any, name: str, form: Any) -> Any:
            rounding = super().observe(graph, x, name, form)
            if name.endswith("1.self_attn.qkv_proj"):
                carried.extend(self._windows)
            return rounding

    monkeypatch.setattr("export.calibration.Calibration", Watched)
    graph = build(tmp_path / "graph", SHAPES["qwen2"], FOUR_BITS, TEXT)
    tokens, start = ids(TEXT.text), 0
    assert len(carried) == -(-len(tokens) // 256)
    for window in carried:
        x = embed(graph.model, tmp_path / "graph", tokens[start : start + window.shape[1]])
        expected = Layer(graph.model, tmp_path / "graph", 0).append(x)
        np.testing.assert_allclose(window, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
        start += window.shape[1]
    assert start == len(tokens)


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens are too few to calibrate with") as caught:
        build(tmp_path / "short", SHAPES["qwen2"], FOUR_BITS, CalibrationText("short", "hello " * (LEAST_TOKENS // 4)))
    assert str(LEAST_TOKENS) in str(caught.value.hint)


def test_the_built_in_text_is_long_and_has_many_languages() -> None:
    text = CalibrationText.open(BUILT_IN).text
    assert len(text.encode()) > 48_000
    for word in ("def ", "SELECT", " und ", "人", "человек", "ERROR", "<|im_start|>"):
        assert word in text


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"\xff\xfe\x00", "no UTF-8 text")])
def test_a_file_that_is_no_text_is_refused(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        CalibrationText.open(str(path))


def test_a_text_is_described_by_name_and_hash(tmp_path: Path) -> None:
    (tmp_path / "plant.txt").write_text("Ventil 4 öffnen", encoding="utf-8")
    described = CalibrationText.open(str(tmp_path / "plant.txt")).describe()
    assert (described["method"], described["text"]) == ("gptq", "plant.txt")
    assert len(described["sha256"]) == 64
