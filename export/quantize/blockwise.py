"""Round-to-nearest blockwise quantization in the layout of onnxruntime's MatMulNBits and GatherBlockQuantized.

Layout (onnxruntime ContribOperators.md, MatMulNBits): codes [rows, blocks, block * bits / 8] uint8 with the low nibble
first, scales [rows, blocks] float32, zero points [rows, ceil(blocks * bits / 8)] uint8 packed the same way. Rows are
independent of each other, so a matrix quantized chunk by chunk equals the matrix quantized whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.quantize.recipes import Blockwise


@dataclass(frozen=True)
class QuantizedRows:
    """Some rows of a quantized matrix."""

    codes: NDArray[np.uint8]  # [rows, blocks, block * bits // 8]
    scales: NDArray[np.float32]  # [rows, blocks]
    zero_points: NDArray[np.uint8]  # [rows, ceil(blocks * bits / 8)]


def quantize_rows(weights: NDArray[np.float32], form: Blockwise) -> QuantizedRows:
    """Quantize ``weights`` [rows, columns]; columns are padded with zeros to whole blocks."""
    rows, columns = weights.shape
    blocks = -(-columns // form.block)
    if columns != blocks * form.block:
        weights = np.pad(weights, ((0, 0), (0, blocks * form.block - columns)))
    grouped = weights.reshape(rows, blocks, form.block)
    # Zero lies inside the range, so that it is exact and the zero point fits.
    low = np.minimum(grouped.min(axis=2), 0.0)
    high = np.maximum(grouped.max(axis=2), 0.0)
    top = float(2**form.bits - 1)
    # Divided before they are subtracted: the range of two large floats is none.
    scales = high / top - low / top
    # A range of denormals has no inverse: such a block is zero.
    scales[scales < np.finfo(np.float32).tiny] = 0.0
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
    zero_points = np.rint(-low * inverse)
    codes = grouped * inverse[:, :, None]
    codes += zero_points[:, :, None]
    np.rint(codes, out=codes)
    np.clip(codes, 0.0, top, out=codes)
    return QuantizedRows(
        codes=_pack(codes.astype(np.uint8), form.bits),
        scales=scales,
        zero_points=_pack(zero_points.astype(np.uint8), form.bits),
    )


def dequantize_rows(quantized: QuantizedRows, form: Blockwise, columns: int) -> NDArray[np.float32]:
    """The float32 values [rows, columns] that the codes stand for."""
    rows, blocks = quantized.scales.shape
    codes = _unpack(quantized.codes, form.bits).astype(np.float32)
    zero_points = _unpack(quantized.zero_points, form.bits)[:, :blocks].astype(np.float32)
    codes -= zero_points[:, :, None]
    codes *= quantized.scales[:, :, None]
    return np.ascontiguousarray(codes.reshape(rows, blocks * form.block)[:, :columns])


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack along the last axis, low nibble first; an odd count is padded with a zero nibble."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], 4), dtype=np.uint8)


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    codes[..., 0::2] = packed & 0x0F
    codes[..., 1::2] = packed >> 4
    return codes
