"""What every quantized checkpoint must pass: its values, what its bundle computes, one clear error where it lies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edge.errors import CheckpointError, ExportError
from export.checkpoint import open_checkpoint
from export.oracle import Decoder
from export.pipeline import Report, export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES, Recipe
from tests.export import packed, tiny

IDS = np.arange(24) * 7 % 200
EXACT = replace(RECIPES["quality"], head=None, accuracy_level=0)
"""Float activations: what remains is the order of sums."""
BASE = "model.layers.0.mlp.down_proj"
"""The matrix that is damaged."""
Damage = Callable[[packed.Parts], None]


def export(source: Path, output: Path, recipe: Recipe, **options: Any) -> Report:
    with open_checkpoint(source) as checkpoint:
        return export_bundle(checkpoint, output, recipe, progress=Silent(), **options)


def nodes(bundle: Path, op_type: str) -> list[ir.Node]:
    return [node for node in ir.load(bundle / "model.onnx").graph if node.op_type == op_type]


def reads_as(model: packed.Model) -> None:
    """Every tensor, in chunks that begin inside of words too, has exactly the reference's values."""
    with open_checkpoint(model.folder) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            name: values.shape for name, values in model.values.items()
        }
        for name, values in model.values.items():
            np.testing.assert_array_equal(checkpoint.rows(name), values, err_msg=name)
            np.testing.assert_array_equal(checkpoint.rows(name, 3, 21), values[3:21], err_msg=name)


def computes_as(model: packed.Model, tmp_path: Path) -> Report:
    """A bundle with the integers computes what one with the reference's values in float32 does."""
    plain = tiny.write_folder(tmp_path / "plain", config_of(model))
    tiny.write_safetensors(plain / "model.safetensors", model.values, "F32")
    export(plain, tmp_path / "reference", RECIPES["fp32"])
    export(model.folder, tmp_path / "float", RECIPES["fp32"])
    data = [(tmp_path / name / "model.onnx.data").read_bytes() for name in ("reference", "float")]
    assert data[0] == data[1]
    report = export(model.folder, tmp_path / "integers", replace(EXACT, table=RECIPES["fp32"].table))
    expected = Decoder(tmp_path / "reference").append(IDS)
    np.testing.assert_allclose(Decoder(tmp_path / "integers").append(IDS), expected, atol=2e-5 * np.abs(expected).max())
    return report


def config_of(model: packed.Model) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model.folder / "config.json").read_text())
    del config["quantization_config"]
    return config


def replaced(part: str, change: Callable[[Any], Any]) -> Damage:
    """Puts something else in place of one tensor."""

    def damage(parts: packed.Parts) -> None:
        parts[f"{BASE}.{part}"] = change(parts[f"{BASE}.{part}"])

    return damage


def without(part: str) -> Damage:
    """Leaves one tensor out."""

    def damage(parts: packed.Parts) -> None:
        del parts[f"{BASE}.{part}"]

    return damage


def refusal(model: packed.Model, damage: Damage, tmp_path: Path) -> str:
    """What an export says of a damaged model; it leaves nothing behind."""
    weights = model.folder / "model.safetensors"
    parts = packed.read_tensors(weights)
    damage(parts)
    packed.write_tensors(weights, parts)
    with pytest.raises((CheckpointError, ExportError)) as caught:
        export(model.folder, tmp_path / "out", RECIPES["balanced"])
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    return str(caught.value)
