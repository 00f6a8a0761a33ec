"""Weights on their way into the data file: chunked, checked, counted, and never whole in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import export.weights
from edge.bundle import WEIGHTS
from edge.errors import ExportError
from export.checkpoint import Checkpoint, open_checkpoint
from export.quantize.blockwise import QuantizedRows, dequantize_rows, quantize_rows, quantize_split
from export.quantize.recipes import RECIPES, Blockwise, Float32, Projections, Recipe
from export.weights import Chunks, DataFile, Weights, to_nearest
from tests.export import tiny

PAGE = 4096
EMBEDDING = "model.embed_tokens.weight"
GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(tiny.write_folder(tmp_path / "checkpoint", tiny.qwen2_config())) as opened:
        yield opened


def quantize(checkpoint: Checkpoint, folder: Path, recipe: Recipe, sources: list[str]) -> bytes:
    """The data file with one matrix."""
    folder.mkdir()
    with DataFile(folder) as file:
        Weights(checkpoint, recipe, file, lambda _: None).matrix("m", sources, recipe.layer.gate_up)
    return (folder / WEIGHTS).read_bytes()


def test_tensors_start_on_pages_and_read_back(tmp_path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "a": np.arange(5, dtype=np.float32),
        "b": np.arange(6, dtype=np.uint8).reshape(2, 3),
    }
    with DataFile(tmp_path) as file:
        values = [file.add(name, array) for name, array in arrays.items()]
    for value in values:
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.const_value.offset is not None
        assert value.const_value.offset % PAGE == 0
        np.testing.assert_array_equal(value.const_value.numpy(), arrays[str(value.name)])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_small_chunks_write_the_same_file(
    checkpoint: Checkpoint, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(checkpoint, tmp_path / "whole", recipe, [GATE, UP])
    monkeypatch.setattr(export.weights, "CHUNK_ELEMENTS", 64 * 5)
    assert quantize(checkpoint, tmp_path / "chunks", recipe, [GATE, UP]) == whole


def test_a_row_longer_than_a_chunk_is_a_chunk(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.weights, "CHUNK_ELEMENTS", 1)
    content = quantize(checkpoint, tmp_path / "rows", RECIPES["fp32"], [GATE])
    np.testing.assert_array_equal(np.frombuffer(content, np.float32).reshape(96, 64), checkpoint.rows(GATE))


def test_stacked_sources_keep_their_order(checkpoint: Checkpoint, tmp_path: Path) -> None:
    form = Blockwise(4, 32)
    with DataFile(tmp_path) as file:
        weights = Weights(checkpoint, Recipe("x", Projections.all(form), form), file, lambda _: None)
        matrix = weights.matrix("m", [UP, GATE], form)
    assert (matrix.rows, matrix.columns) == (192, 64)
    expected = quantize_rows(np.concatenate([checkpoint.rows(UP), checkpoint.rows(GATE)]), form)
    parts = [part.const_value.numpy() for part in matrix.parts if part.const_value is not None]
    for found, wanted in zip(parts, (expected.codes, expected.scales, expected.zero_points), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert matrix.num_bytes == sum(part.nbytes for part in parts)


@pytest.mark.parametrize(("stored", "dtype"), [("float16", ir.DataType.FLOAT16), ("float32", ir.DataType.FLOAT)])
def test_scales_are_stored_as_the_recipe_says(
    checkpoint: Checkpoint, tmp_path: Path, stored: Literal["float16", "float32"], dtype: ir.DataType
) -> None:
    form = Blockwise(4, 32)
    recipe = Recipe("x", Projections.all(form), form, scales=stored)
    with DataFile(tmp_path) as file:
        scales = Weights(checkpoint, recipe, file, lambda _: None).matrix("m", [GATE], form).parts[1]
    assert scales.dtype == dtype
    assert scales.const_value is not None
    np.testing.assert_array_equal(scales.const_value.numpy(), quantize_rows(checkpoint.rows(GATE), form).scales)


def test_scales_with_more_digits_than_float16_lose_none(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def rounding(chunks: Chunks, form: Blockwise) -> Iterator[QuantizedRows]:
        for rows in to_nearest(chunks, form):
            yield replace(rows, scales=rows.scales * np.float32(1.00001))

    form = Blockwise(4, 32)
    with DataFile(tmp_path) as file:
        weights = Weights(checkpoint, Recipe("x", Projections.all(form), form), file, lambda _: None)
        scales = weights.matrix("m", [GATE], form, rounding).parts[1]
    assert scales.dtype == ir.DataType.FLOAT


def test_codes_taken_apart_in_small_chunks_are_those_taken_apart_at_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, corrected, files = Blockwise(6, 64), np.arange(1, 64, 2), []
    for name, chunk in (("whole", export.weights.CHUNK_ELEMENTS), ("chunks", 64 * 7)):
        monkeypatch.setattr(export.weights, "CHUNK_ELEMENTS", chunk)
        (tmp_path / name).mkdir()
        with DataFile(tmp_path / name) as file:
            weights = Weights(checkpoint, RECIPES["balanced"], file, lambda _: None)
            split = weights.split("m", EMBEDDING, form, corrected)
        assert weights.parameter_count == split.rows * 64
        files.append((tmp_path / name / WEIGHTS).read_bytes())
    assert files[0] == files[1]
    upper, lower = quantize_split(checkpoint.rows(EMBEDDING), form)
    for matrix, rows in ((split.upper, upper), (split.lower, lower)):
        assert matrix.parts[0].const_value is not None
        np.testing.assert_array_equal(matrix.parts[0].const_value.numpy(), rows.codes)
    # The scales stand there once.
    assert split.upper.parts[1] is split.lower.parts[1]
    assert split.row_bytes == 48 + 2 + 1
    # What the upper bits lack, in 4 bits.
    lacking = checkpoint.rows(EMBEDDING) - dequantize_rows(upper, Blockwise(4, 64), 64)
    correction = split.correction
    assert correction is not None
    values = [part.const_value.numpy() for part in correction.parts if part.const_value is not None]
    found = dequantize_rows(
        QuantizedRows(values[0], values[1].astype(np.float32), None), Blockwise(4, 32, symmetric=True), 32
    )
    np.testing.assert_array_equal(correction.order, corrected)
    furthest = np.abs(lacking[:, corrected]).max(axis=1, keepdims=True)
    assert (np.abs(found - lacking[:, corrected]) <= furthest / 7 * 0.51).all()


def test_a_dequantizing_recipe_stores_what_the_codes_stand_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    form = Blockwise(4, 32)
    recipe = Recipe("x", Projections.all(form), form, dequantize=True)
    content = quantize(checkpoint, tmp_path / "dequantized", recipe, [GATE])
    expected = dequantize_rows(quantize_rows(checkpoint.rows(GATE), form), form, 64)
    np.testing.assert_array_equal(np.frombuffer(content, np.float32).reshape(96, 64), expected)


def test_progress_adds_up_to_the_parameters(checkpoint: Checkpoint, tmp_path: Path) -> None:
    steps: list[int] = []
    with DataFile(tmp_path) as file:
        weights = Weights(checkpoint, RECIPES["balanced"], file, steps.append)
        weights.matrix("m", [GATE, UP], Float32())
        weights.vector("v", ["model.norm.weight"])
        weights.matrix("again", [GATE], Blockwise(4, 32))
    assert sum(steps) == weights.parameter_count == 2 * 96 * 64 + 64


@pytest.mark.parametrize("name", [GATE, "model.norm.weight", "model.layers.1.self_attn.k_proj.bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused_by_the_name_of_its_tensor(tmp_path: Path, name: str, value: float) -> None:
    folder = tiny.write_folder(tmp_path / "bad", tiny.qwen2_config())
    tensors = tiny.random_tensors(tiny.qwen2_config())
    tensors[name].flat[-1] = value
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    with open_checkpoint(folder) as checkpoint, DataFile(tmp_path) as file:
        weights = Weights(checkpoint, RECIPES["balanced"], file, lambda _: None)
        add = weights.vector if tensors[name].ndim == 1 else partial(weights.matrix, form=Blockwise(4, 32))
        with pytest.raises(ExportError, match=f"{name} holds NaN or infinity"):
            add("x", [name])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_memory_follows_the_chunk_and_not_the_matrix(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 1 << 15
    monkeypatch.setattr(export.weights, "CHUNK_ELEMENTS", chunk)
    config = tiny.qwen2_config(vocab_size=32768, num_hidden_layers=1)
    with open_checkpoint(tiny.write_folder(tmp_path / "m", config)) as checkpoint, DataFile(tmp_path) as file:
        weights = Weights(checkpoint, recipe, file, lambda _: None)
        tracemalloc.start()
        try:
            matrix = weights.matrix("m", [EMBEDDING], recipe.table)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    scales = matrix.rows * matrix.columns // 32 * 5
    assert peak < 10 * 4 * chunk + 2 * scales
    assert peak < matrix.rows * matrix.columns * 4 / 3
