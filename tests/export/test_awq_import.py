"""AWQ checkpoints: the integers are kept, and stand for what the reference formula says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.errors import CheckpointError
from export.checkpoint import open_checkpoint
from export.quantize.recipes import RECIPES
from tests.export import packed, tiny
from tests.export.packed_checks import Damage, computes_as, export, nodes, reads_as, refusal, replaced, without

GEMM = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def with_extremes(_: str, grid: packed.Grid) -> packed.Grid:
    """Zero points of 0 too."""
    return replace(grid, zeros=np.where(grid.zeros == 1, 0, grid.zeros))


@pytest.mark.parametrize("make_config", [tiny.qwen2_config, tiny.qwen3_config])
def test_integers_are_kept_and_values_are_those_of_the_formula(tmp_path: Path, make_config: Any) -> None:
    model = packed.write_folder(tmp_path / "m", make_config(), packed.awq, GEMM, change=with_extremes)
    reads_as(model)
    report = computes_as(model, tmp_path)
    assert len(nodes(tmp_path / "integers", "MatMulNBits")) == 8
    assert report.manifest.recipe["as_stored"] == {"method": "awq", "matrices": 8, "requantized": 0}


def test_layers_that_are_left_in_floats_follow_the_recipe(tmp_path: Path) -> None:
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.awq, GEMM)
    weights = model.folder / "model.safetensors"
    parts = packed.read_tensors(weights)
    for name in [name for name in parts if "layers.1" in name and "_proj." in name and "bias" not in name]:
        del parts[name]
        base = f"{name.rpartition('.')[0]}.weight"
        parts[base] = model.values[base]
    packed.write_tensors(weights, parts)
    reads_as(model)
    report = export(model.folder, tmp_path / "out", RECIPES["balanced"])
    assert report.manifest.recipe["as_stored"] == {"method": "awq", "matrices": 4, "requantized": 0}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without("scales"), "has no scales"),
        (without("qzeros"), "has no qzeros"),
        (replaced("qweight", lambda x: x.astype(np.float32)), "has a qweight of F32"),
        (replaced("qweight", lambda x: x[:, :4]), "parts that do not fit"),
        (replaced("qweight", lambda x: x[:64]), "3 groups for 64 columns"),
        (replaced("qweight", lambda x: x[:48]), "tensors of the wrong shape"),
        (replaced("qzeros", lambda x: x[:2]), "parts that do not fit"),
        (replaced("scales", lambda x: x[:, :32]), "parts that do not fit"),
        (replaced("scales", lambda x: x.reshape(-1)), "with 2 dimensions"),
        (replaced("scales", lambda x: x * np.float16(np.inf)), "NaN or infinity"),
    ],
)
def test_parts_that_lie(tmp_path: Path, damage: Damage, expected: str) -> None:
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(num_hidden_layers=1), packed.awq, GEMM)
    assert expected in refusal(model, damage, tmp_path)


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"version": None}, {"bits": 8}, {"bits": "4"}])
def test_versions_that_are_not_supported(tmp_path: Path, change: dict[str, Any]) -> None:
    settings = GEMM | change
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(num_hidden_layers=1), packed.awq, settings)
    with pytest.raises(CheckpointError, match="AWQ of version"), open_checkpoint(model.folder):
        pass
