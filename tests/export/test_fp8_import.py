"""FP8 checkpoints: read as the floats that their blocks stand for, then quantized by the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.errors import CheckpointError
from export.checkpoint import open_checkpoint
from export.quantize.recipes import RECIPES
from tests.export import packed, tiny, tiny_qwen3_5
from tests.export.packed_checks import Damage, config_of, export, reads_as, refusal, replaced, without

BLOCKS: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 48],
}


@pytest.mark.parametrize("block", [[128, 128], [32, 48]])
@pytest.mark.parametrize("scales", ["float32", "float16"])
def test_values_are_those_of_the_formula(tmp_path: Path, block: list[int], scales: str) -> None:
    settings = BLOCKS | {"weight_block_size": block}
    reads_as(packed.write_fp8(tmp_path / "m", tiny.qwen3_config(), settings, scales=scales))


@pytest.mark.parametrize("recipe", ["balanced", "fp32"])
def test_a_bundle_is_that_of_the_floats(tmp_path: Path, recipe: str) -> None:
    model = packed.write_fp8(tmp_path / "m", tiny.qwen3_config(), BLOCKS)
    plain = tiny.write_folder(tmp_path / "plain", config_of(model))
    tiny.write_safetensors(plain / "model.safetensors", model.values, "F32")
    report = export(model.folder, tmp_path / "fp8", RECIPES[recipe])
    export(plain, tmp_path / "floats", RECIPES[recipe])
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "fp8" / name).read_bytes() == (tmp_path / "floats" / name).read_bytes()
    assert any("floats of fp8" in note for note in report.notes) == (recipe != "fp32")


def test_the_text_of_a_model_that_sees(tmp_path: Path) -> None:
    model = packed.write_fp8(tmp_path / "m", tiny_qwen3_5.config(), BLOCKS)
    with open_checkpoint(model.folder) as checkpoint:
        for name in checkpoint.tensors:
            source = name.replace("model.", "model.language_model.")
            np.testing.assert_array_equal(checkpoint.rows(name), model.values[source], err_msg=name)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without("weight"), "has no weight"),
        (without("weight_scale_inv"), "has dtype 'F8_E4M3'"),
        (replaced("weight", lambda x: x.astype(np.float32)), "a weight of F32"),
        (replaced("weight", lambda x: x[:, :48]), "has [2, 2] blocks, not [2, 1]"),
        (replaced("weight_scale_inv", lambda x: x[:1]), "has [1, 2] blocks, not [2, 2]"),
        (replaced("weight_scale_inv", lambda x: x.astype(np.int32)), "a weight_scale_inv of I32"),
        (replaced("weight_scale_inv", lambda x: x * np.float32(np.inf)), "NaN or infinity"),
        (replaced("weight", lambda x: x | 127), "NaN or infinity"),
    ],
)
def test_parts_that_lie(tmp_path: Path, damage: Damage, expected: str) -> None:
    model = packed.write_fp8(tmp_path / "m", tiny.qwen2_config(num_hidden_layers=1), BLOCKS)
    assert expected in refusal(model, damage, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_block_size": None},
        {"weight_block_size": [128]},
        {"weight_block_size": [0, 128]},
        {"weight_block_size": "128"},
        {"fmt": "e5m2"},
    ],
)
def test_formats_that_are_not_supported(tmp_path: Path, change: dict[str, Any]) -> None:
    model = packed.write_fp8(tmp_path / "m", tiny.qwen2_config(num_hidden_layers=1), BLOCKS)
    tiny.write_json(model.folder / "config.json", config_of(model) | {"quantization_config": BLOCKS | change})
    with pytest.raises(CheckpointError, match="FP8 of format"), open_checkpoint(model.folder):
        pass
