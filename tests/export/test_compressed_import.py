"""compressed-tensors checkpoints: the integers are kept, and stand for what the reference formula says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.errors import CheckpointError
from export.checkpoint import open_checkpoint
from tests.export import packed, tiny
from tests.export.packed_checks import Damage, computes_as, config_of, reads_as, refusal, replaced, without

PACKED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
}


def with_extremes(_: str, grid: packed.Grid) -> packed.Grid:
    """Zero points of 0 too."""
    return replace(grid, zeros=np.where(grid.zeros == 1, 0, grid.zeros))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integers_are_kept_and_values_are_those_of_the_formula(tmp_path: Path, bits: int, *, symmetric: bool) -> None:
    model = packed.write_folder(
        tmp_path / "m",
        tiny.qwen3_config(),
        packed.compressed,
        PACKED,
        bits=bits,
        symmetric=symmetric,
        change=with_extremes,
    )
    parts = packed.read_tensors(model.folder / "model.safetensors")
    assert any("zero_point" in name for name in parts) == (not symmetric)
    reads_as(model)
    report = computes_as(model, tmp_path)
    assert report.manifest.recipe["as_stored"] == {"method": "compressed-tensors", "matrices": 8, "requantized": 0}


def test_columns_in_order_of_their_inputs(tmp_path: Path) -> None:
    group = packed.shuffled(32)
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.compressed, PACKED, group=group)
    reads_as(model)
    assert computes_as(model, tmp_path).manifest.recipe["as_stored"]["matrices"] == 8


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without("weight_scale"), "has no weight_scale"),
        (without("weight_shape"), "has no weight_shape"),
        (without("weight_packed"), "has dtype 'I64'"),
        (replaced("weight_shape", lambda x: x[:1]), "none of a matrix"),
        (replaced("weight_shape", lambda x: x * 0), "the weight_shape [0, 0]"),
        (replaced("weight_shape", lambda x: -x), "the weight_shape [-64, -96]"),
        (replaced("weight_shape", lambda x: x * 2), "2 bits"),
        (replaced("weight_shape", lambda x: np.add(x, (64, 0))), "parts that do not fit"),
        (replaced("weight_packed", lambda x: x.astype(np.int64)), "a weight_packed of I64"),
        (replaced("weight_packed", lambda x: x[:32]), "parts that do not fit"),
        (replaced("weight_zero_point", lambda x: x[:4]), "parts that do not fit"),
        (replaced("weight_scale", lambda x: x[:, :2]), "parts that do not fit"),
        (replaced("weight_scale", lambda x: x * np.float16(np.nan)), "NaN"),
    ],
)
def test_parts_that_lie(tmp_path: Path, damage: Damage, expected: str) -> None:
    config = tiny.qwen2_config(num_hidden_layers=1)
    assert expected in refusal(packed.write_folder(tmp_path / "m", config, packed.compressed, PACKED), damage, tmp_path)


@pytest.mark.parametrize("name", ["float-quantized", "marlin-24", None, 4])
def test_formats_that_are_not_supported(tmp_path: Path, name: Any) -> None:
    config = tiny.qwen2_config(num_hidden_layers=1)
    model = packed.write_folder(tmp_path / "m", config, packed.compressed, PACKED)
    tiny.write_json(model.folder / "config.json", config_of(model) | {"quantization_config": PACKED | {"format": name}})
    with pytest.raises(CheckpointError, match="compressed-tensors in the format"), open_checkpoint(model.folder):
        pass
