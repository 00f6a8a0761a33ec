"""GPTQ checkpoints: the integers are kept, and stand for what the reference formula says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.errors import CheckpointError
from export.architectures import architecture_for
from export.calibration import BUILT_IN, CalibrationText
from export.checkpoint import open_checkpoint
from export.quantize.recipes import RECIPES
from tests.export import packed, peft, tiny, tiny_qwen3_5
from tests.export.packed_checks import Damage, computes_as, export, nodes, reads_as, refusal, replaced, without

V1: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
V2 = V1 | {"checkpoint_format": "gptq_v2"}


@pytest.mark.parametrize("make_config", [tiny.qwen2_config, tiny.qwen3_config])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_are_those_of_the_formula(
    tmp_path: Path, make_config: Any, bits: int, version: int, *, symmetric: bool
) -> None:
    write, settings = (packed.gptq, V1) if version == 1 else (packed.gptq_v2, V2)
    settings = settings | {"bits": bits}
    reads_as(packed.write_folder(tmp_path / "m", make_config(), write, settings, bits=bits, symmetric=symmetric))


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_kept(tmp_path: Path, bits: int) -> None:
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.gptq, V1, bits=bits)
    report = computes_as(model, tmp_path)
    # Two layers of qkv, o, gate_up and down; the table is float32 here.
    products = nodes(tmp_path / "integers", "MatMulNBits")
    assert [(each.attributes["bits"].as_int(), each.attributes["block_size"].as_int()) for each in products] == [
        (bits, 32)
    ] * 8
    assert len(nodes(tmp_path / "integers", "Gather")) == len(nodes(tmp_path / "float", "Gather"))
    assert report.manifest.recipe["as_stored"] == {"method": "gptq", "matrices": 8, "requantized": 0}
    assert "8 matrices of the layers keep the integers of gptq" in report.notes[-1]


def test_columns_in_order_of_their_inputs(tmp_path: Path) -> None:
    settings = V1 | {"desc_act": True}
    model = packed.write_folder(tmp_path / "m", tiny.qwen3_config(), packed.gptq, settings, group=packed.shuffled(32))
    reads_as(model)
    report = computes_as(model, tmp_path)
    assert report.manifest.recipe["as_stored"]["matrices"] == 8
    assert len(nodes(tmp_path / "integers", "Gather")) == len(nodes(tmp_path / "float", "Gather")) + 8


def test_the_text_of_a_model_that_sees(tmp_path: Path) -> None:
    model = packed.write_folder(tmp_path / "m", tiny_qwen3_5.config(), packed.gptq, V1)
    with open_checkpoint(model.folder) as checkpoint:
        for name in checkpoint.tensors:
            source = name.replace("model.", "model.language_model.")
            np.testing.assert_array_equal(checkpoint.rows(name), model.values[source], err_msg=name)
    report = export(model.folder, tmp_path / "out", RECIPES["balanced"])
    # Three layers of out_proj, gate_up and down, and one of qkv, o, gate_up and down.
    assert report.manifest.recipe["as_stored"] == {"method": "gptq", "matrices": 13, "requantized": 0}


def test_zero_points_of_zero_borrow_from_their_neighbours(tmp_path: Path) -> None:
    def zero(_: str, grid: packed.Grid) -> packed.Grid:
        return replace(grid, zeros=np.where(grid.zeros % 3 == 0, 0, grid.zeros))

    reads_as(packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.gptq, V1, change=zero))


def test_one_group_for_a_whole_row_is_kept_in_blocks(tmp_path: Path) -> None:
    settings = V1 | {"group_size": -1}
    group: packed.Group = lambda _, columns: np.zeros(columns, np.int64)  # noqa: E731
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.gptq, settings, group=group)
    report = computes_as(model, tmp_path)
    assert report.manifest.recipe["as_stored"]["matrices"] == 8
    assert report.manifest.row_multiple == 2


def test_what_no_kernel_takes_follows_the_recipe(tmp_path: Path) -> None:
    def uneven(name: str, columns: int) -> Any:
        groups = np.arange(columns) // 32
        groups[31] = 1 if "o_proj" in name else 0
        return groups

    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.gptq, V1, group=uneven)
    reads_as(model)
    report = export(model.folder, tmp_path / "out", RECIPES["balanced"])
    assert report.manifest.recipe["as_stored"] == {"method": "gptq", "matrices": 6, "requantized": 2}
    assert "2 that no kernel takes" in report.notes[-1]


def test_projections_sorted_differently_are_not_stacked(tmp_path: Path) -> None:
    def group(name: str, columns: int) -> Any:
        return np.random.default_rng(len(name) if "v_proj" in name else 0).permutation(np.arange(columns) // 32)

    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.gptq, V1, group=group)
    report = export(model.folder, tmp_path / "out", RECIPES["balanced"])
    assert report.manifest.recipe["as_stored"]["requantized"] == 2


def test_biases_of_zeros_are_left_out(tmp_path: Path) -> None:
    def biased(grid: packed.Grid) -> packed.Parts:
        return packed.gptq(grid) | {"bias": np.zeros(len(grid.codes), np.float16)}

    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), biased, V1)
    reads_as(model)


def test_the_reference_of_integers_is_their_floats(tmp_path: Path) -> None:
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.gptq, V1, group=packed.shuffled(32))
    recipe = replace(RECIPES["balanced"], dequantize=True, table=RECIPES["fp32"].table, head=None)
    export(model.folder, tmp_path / "dequantized", recipe)
    export(model.folder, tmp_path / "float", RECIPES["fp32"])
    data = [(tmp_path / name / "model.onnx.data").read_bytes() for name in ("dequantized", "float")]
    assert data[0] == data[1]


def test_calibration_an_int8_cache_and_adapters_go_with_integers(tmp_path: Path) -> None:
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.gptq, V1, group=packed.shuffled(32))
    adapter = peft.write_adapter(tmp_path / "adapter", peft.adapter_tensors(tiny.shapes(tiny.qwen2_config()), rank=4))
    options = {"calibration": CalibrationText.open(BUILT_IN), "kv": "int8", "adapters": {"one": adapter}}
    report = export(model.folder, tmp_path / "out", RECIPES["balanced"], **options)
    assert report.manifest.recipe["as_stored"]["matrices"] == 8


def test_bundles_repeat_to_the_byte(tmp_path: Path) -> None:
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.gptq, V1)
    export(model.folder, tmp_path / "a", RECIPES["balanced"])
    export(model.folder, tmp_path / "b", RECIPES["balanced"])
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without("scales"), "has no scales"),
        (without("qzeros"), "has no qzeros"),
        (without("qweight"), "has dtype 'I32'"),
        (replaced("qweight", lambda x: x.astype(np.int64)), "has a qweight of I64"),
        (replaced("qweight", lambda x: x[:, :32]), "parts that do not fit"),
        (replaced("qweight", lambda x: x[:6]), "a g_idx for 96 of 48 columns"),
        (replaced("qzeros", lambda x: x[:, :6]), "3 bits"),
        (replaced("qzeros", lambda x: x[:2]), "parts that do not fit"),
        (replaced("scales", lambda x: x.astype(np.int32)), "scales of I32"),
        (replaced("scales", lambda x: x[:2]), "parts that do not fit"),
        (replaced("g_idx", lambda x: x + 1), "does not number its 3 groups"),
        (replaced("g_idx", lambda x: x - 1), "does not number its 3 groups"),
        (replaced("g_idx", lambda x: x.astype(np.float32)), "g_idx of F32"),
        (replaced("scales", lambda x: x * np.float16(np.nan)), "NaN"),
    ],
)
def test_parts_that_lie(tmp_path: Path, damage: Damage, expected: str) -> None:
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(num_hidden_layers=1), packed.gptq, V1)
    assert expected in refusal(model, damage, tmp_path)


def test_an_order_of_columns_that_is_missing(tmp_path: Path) -> None:
    settings, config = V1 | {"desc_act": True}, tiny.qwen2_config(num_hidden_layers=1)
    model = packed.write_folder(tmp_path / "m", config, packed.gptq, settings, group=packed.shuffled(32))
    assert "has no g_idx, but columns in order of their inputs" in refusal(model, without("g_idx"), tmp_path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "aqlm"}, "quantized with 'aqlm'"),
        ({"quant_method": 4}, "quantized with 4"),
        ({"bits": 4}, "quantized with 'unknown'"),
        ("gptq", "no object"),
        (V1 | {"checkpoint_format": "marlin"}, "format 'marlin'"),
        (V1 | {"checkpoint_format": ["gptq"]}, "format ['gptq']"),
    ],
)
def test_methods_that_are_not_supported(tmp_path: Path, settings: Any, expected: str) -> None:
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(num_hidden_layers=1), packed.gptq, V1)
    tiny.write_json(model.folder / "config.json", tiny.qwen2_config(quantization_config=settings))
    with pytest.raises(CheckpointError) as caught, open_checkpoint(model.folder):
        pass
    assert expected in str(caught.value)
    assert caught.value.hint


def test_a_layer_of_integers_without_a_config_that_says_so(tmp_path: Path) -> None:
    model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(num_hidden_layers=1), packed.gptq, V1)
    tiny.write_json(model.folder / "config.json", tiny.qwen2_config(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="dtype 'I32'"), open_checkpoint(model.folder) as checkpoint:
        architecture_for(checkpoint.config)
