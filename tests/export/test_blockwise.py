"""Blockwise quantization: its error bounds, its layout, and that onnxruntime's kernels read it the same way."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from export.quantize.blockwise import (
    QuantizedRows,
    dequantize_rows,
    pack_rows,
    quantize_rows,
    quantize_split,
    split_forms,
)
from export.quantize.recipes import Blockwise

ASYMMETRIC = [Blockwise(4, 32), Blockwise(4, 64), Blockwise(4, 128), Blockwise(8, 32), Blockwise(8, 128)]
FORMS = [*ASYMMETRIC, Blockwise(4, 32, symmetric=True), Blockwise(8, 64, symmetric=True)]
UP = 1 + 2**-10
"""Scales are the next float16 up."""
Rows = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]


def random_rows(rows: int, columns: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def round_trip(weights: Rows, form: Blockwise) -> Rows:
    return dequantize_rows(quantize_rows(weights, form), form, weights.shape[1])


def blocks_of(weights: Rows, form: Blockwise) -> Rows:
    """[rows, blocks, block], the last block filled with zeros."""
    padding = -weights.shape[1] % form.block
    return np.pad(weights, ((0, 0), (0, padding))).reshape(len(weights), -1, form.block)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("columns", [128, 256, 96, 100, 1])
def test_no_value_moves_further_than_half_a_step(form: Blockwise, columns: int) -> None:
    weights = random_rows(5, columns)
    error = blocks_of(np.abs(round_trip(weights, form) - weights), form).max(axis=2)
    grouped = blocks_of(weights, form)
    low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
    half = 2 ** (form.bits - 1)
    # The range includes zero; an asymmetric zero point is rounded too, which may cost another half step at the ends.
    step = np.maximum(high / (half - 1), -low / half) / 2 if form.symmetric else (high - low) / (2 * half - 1)
    assert (error <= step * 1.0001 * UP).all()
    assert np.median(error / step) < 0.75 * (1 + form.symmetric)


# Denormals stand as an example: a session that another test ran may have switched them off for this thread.
@given(
    weights=arrays(
        np.float32,
        (3, 40),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
    ),
    form=st.sampled_from(FORMS),
)
@example(weights=np.full((3, 40), 1e-42, np.float32), form=FORMS[0])
@example(weights=np.full((3, 40), -1.2e-38, np.float32), form=FORMS[2])
@example(weights=np.full((3, 40), 3.402288e38, np.float32), form=FORMS[0])
@settings(max_examples=200, deadline=None)
def test_any_finite_value_survives(weights: Rows, form: Blockwise) -> None:
    """The smallest floats, the largest and mixtures of both: always finite, zeros stay zeros, signs never flip."""
    restored = round_trip(weights, form)
    assert np.isfinite(restored).all()
    assert (restored[weights == 0] == 0).all()
    assert (restored * np.sign(weights) >= 0).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5, 1e-30, -3e38])
def test_a_constant_block_is_as_exact_as_its_scale(form: Blockwise, value: float) -> None:
    weights = np.full((2, 2 * form.block), value, np.float32)
    np.testing.assert_allclose(round_trip(weights, form), weights, rtol=2**-10, atol=2.0**-25)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_scales_are_numbers_of_float16_where_it_reaches(form: Blockwise) -> None:
    usual = quantize_rows(random_rows(9, 2 * form.block), form).scales
    np.testing.assert_array_equal(usual, usual.astype(np.float16))
    huge = quantize_rows(random_rows(9, 2 * form.block) * np.float32(1e30), form).scales
    assert np.isfinite(huge).all()
    assert (huge > np.finfo(np.float16).max).all()


@pytest.mark.parametrize("form", ASYMMETRIC, ids=str)
def test_values_on_the_grid_are_exact(form: Blockwise) -> None:
    codes = np.random.default_rng(1).integers(0, 2**form.bits, (4, form.block))
    codes[:, 0], codes[:, 1] = 0, 2**form.bits - 1
    weights = ((codes - 3) * 0.25).astype(np.float32)
    np.testing.assert_allclose(round_trip(weights, form), weights, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_quantized_in_chunks_are_those_quantized_at_once(form: Blockwise) -> None:
    weights = random_rows(11, 3 * form.block)
    whole = quantize_rows(weights, form)
    chunks = [quantize_rows(weights[start : start + 4], form) for start in (0, 4, 8)]
    assert (whole.zero_points is None) == form.symmetric
    for field in ("codes", "scales") if form.symmetric else ("codes", "scales", "zero_points"):
        joined = np.concatenate([getattr(chunk, field) for chunk in chunks])
        np.testing.assert_array_equal(joined, getattr(whole, field))


@pytest.mark.parametrize(("bits", "columns", "zero_bytes"), [(4, 96, 2), (4, 128, 2), (4, 33, 1), (8, 96, 3)])
def test_the_layout_is_that_of_the_operator(bits: int, columns: int, zero_bytes: int) -> None:
    quantized = quantize_rows(random_rows(5, columns), Blockwise(bits, 32))
    blocks = -(-columns // 32)
    assert quantized.codes.shape == (5, blocks, 32 * bits // 8)
    assert quantized.scales.shape == (5, blocks)
    assert quantized.zero_points is not None
    assert quantized.zero_points.shape == (5, zero_bytes)
    assert quantized.codes.dtype == np.uint8
    assert quantized.scales.dtype == np.float32


def test_the_low_nibble_comes_first() -> None:
    weights = np.zeros((1, 32), np.float32)
    weights[0, :3] = [15.0, 1.0, 2.0]  # a scale of 1
    codes = quantize_rows(weights, Blockwise(4, 32)).codes[0, 0]
    assert [int(code) for code in codes[:2]] == [0x1F, 0x02]


def test_of_four_codes_in_a_byte_the_first_is_lowest() -> None:
    codes = np.arange(8, dtype=np.uint8)[None] % 4
    packed = pack_rows(codes, np.ones((1, 1), np.float32), np.full((1, 1), 2, np.uint8), Blockwise(2, 8))
    assert packed.codes.tolist() == [[[0b11100100] * 2]]
    assert packed.zero_points is not None
    assert packed.zero_points.tolist() == [[0b10]]
    np.testing.assert_array_equal(dequantize_rows(packed, Blockwise(2, 8), 7), codes[:, :7] - np.float32(2))


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("shift", [-3.0, -0.5, 0.0, 0.5, 3.0])
def test_codes_taken_apart_are_a_coarse_copy_and_what_it_lacks(bits: int, block: int, shift: float) -> None:
    form, parts = Blockwise(bits, block), 2 ** (bits - 4)
    weights = random_rows(64, 3 * block) + np.float32(shift)
    (upper, lower), (copy, fine) = quantize_split(weights, form), split_forms(form)
    coarse = dequantize_rows(upper, copy, 3 * block)
    rest = dequantize_rows(lower, fine, 3 * block) / parts
    whole = coarse + rest
    np.testing.assert_array_equal(whole.astype(np.float64), coarse.astype(np.float64) + rest)
    step = np.repeat(upper.scales, block, axis=1)
    assert (np.abs(whole - weights) <= step / parts * 0.5001).all()
    assert (np.abs(coarse - weights) <= step * (0.5001 + 0.5 / parts)).all()
    # A copy made by itself is little better: what is cut off two bits is not even in the mean. Nor is the whole with
    # zero points of all bits.
    alone, same = (np.square(round_trip(weights, Blockwise(each, block)) - weights).mean() for each in (4, bits))
    assert np.square(coarse - weights).mean() < (1.05 if bits == 8 else 1.25) * alone
    assert np.square(whole - weights).mean() < 1.15 * same


@given(
    weights=arrays(
        np.float32,
        (3, 40),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
    )
)
@example(weights=np.full((3, 40), 3.402288e38, np.float32))
@example(weights=np.full((3, 40), -1e-42, np.float32))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("bits", [6, 8])
def test_codes_taken_apart_of_any_finite_value_are_finite(bits: int, weights: Rows) -> None:
    (upper, lower), (copy, rest) = quantize_split(weights, Blockwise(bits, 32)), split_forms(Blockwise(bits, 32))
    whole = dequantize_rows(upper, copy, 40) + dequantize_rows(lower, rest, 40) / 2**rest.bits
    assert np.isfinite(whole).all()
    assert (whole[weights == 0] == 0).all()
    assert (whole * np.sign(weights) >= 0).all()


@pytest.mark.parametrize(
    ("block", "columns", "expected"),
    [(128, 896, 128), (128, 1536, 128), (128, 64, 64), (128, 96, 32), (128, 100, 32), (32, 100, 32)],
)
def test_a_format_takes_the_largest_block_that_fits(block: int, columns: int, expected: int) -> None:
    assert Blockwise(8, block).fit(columns) == Blockwise(8, expected)


def run_node(op_type: str, inputs: Arrays, fed: str, shape: list[int], **attributes: int) -> Rows:
    """One node with all inputs but ``fed`` as initializers."""
    values = {
        name: ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        for name, array in inputs.items()
    }
    node = ir.node(op_type, list(values.values()), attributes, domain="com.microsoft")
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    for name in inputs.keys() - {fed}:
        values[name].const_value = ir.tensor(inputs[name], name=name)
    weights = [values[name] for name in inputs if name != fed]
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([values[fed]], [output], nodes=[node], initializers=weights, opset_imports=opsets, name="one")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    result: Rows = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {fed: inputs[fed]})[0]
    return result


def grid(quantized: QuantizedRows) -> Arrays:
    """Scales, and zero points where there are any."""
    arrays: Arrays = {"scales": quantized.scales}
    if quantized.zero_points is not None:
        arrays["zero_points"] = quantized.zero_points
    return arrays


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("columns", [128, 384, 100])
def test_matmulnbits_multiplies_by_the_dequantized_values(form: Blockwise, columns: int) -> None:
    form, weights, x = form.fit(columns), random_rows(48, columns), random_rows(3, columns, seed=1)
    q = quantize_rows(weights, form)
    inputs: Arrays = {"x": x, "codes": q.codes, **grid(q)}
    sizes = {"K": columns, "N": 48, "bits": form.bits, "block_size": form.block, "accuracy_level": 0}
    found = run_node("MatMulNBits", inputs, "x", [3, 48], **sizes)
    np.testing.assert_allclose(found, x @ round_trip(weights, form).T, atol=1e-5 * np.abs(found).max())


@pytest.mark.parametrize("form", [*FORMS, Blockwise(8, 64)], ids=str)
def test_gatherblockquantized_reads_the_same_bytes(form: Blockwise) -> None:
    """The embedding is the head's matrix under another shape; odd numbers of blocks included."""
    columns = 3 * form.block
    weights, ids = random_rows(40, columns), np.array([[39, 0, 7]])
    q: QuantizedRows = quantize_rows(weights, form)
    table = q.codes.reshape(40, -1)
    inputs: Arrays = {"table": table, "ids": ids, **grid(q)}
    sizes = {"bits": form.bits, "block_size": form.block, "gather_axis": 0, "quantize_axis": 1}
    found = run_node("GatherBlockQuantized", inputs, "ids", [1, 3, columns], **sizes)
    np.testing.assert_array_equal(found[0], round_trip(weights, form)[ids[0]])
