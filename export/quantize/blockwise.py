"""Blockwise quantization, to nearest, in the layout of onnxruntime's MatMulNBits and GatherBlockQuantized.

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
    """Quantize ``weights`` [rows, columns] to nearest; columns are padded with zeros to whole blocks."""
    rows, columns = weights.shape
    blocks = -(-columns // form.block)
    if columns != blocks * form.block:
        weights = np.pad(weights, ((0, 0), (0, blocks * form.block - columns)))
    grouped = weights.reshape(rows, blocks, form.block)
    scales, zero_points = block_grid(grouped, form.bits)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
    codes = grouped * inverse[:, :, None]
    codes += zero_points[:, :, None]
    np.rint(codes, out=codes)
    np.clip(codes, 0.0, 2**form.bits - 1, out=codes)
    return pack_rows(codes.astype(np.uint8), scales, zero_points, form)


def block_grid(weights: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scales and zero points of the grids that span ``weights`` [..., block]: both [...]."""
    # Zero lies inside the range, so that it is exact and the zero point fits.
    low = np.minimum(weights.min(axis=-1), 0.0)
    high = np.maximum(weights.max(axis=-1), 0.0)
    top = float(2**bits - 1)
    # Divided before they are subtracted: the range of two large floats is none.
    # And no code may stand for more than the largest float.
    scales = np.minimum(high / top - low / top, np.finfo(np.float32).max / (top + 1))
    # A range of denormals has no inverse: such a block is zero.
    scales[scales < np.finfo(np.float32).tiny] = 0.0
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
    return scales, np.minimum(np.rint(-low * inverse), top).astype(np.uint8)


def pack_rows(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], zero_points: NDArray[np.uint8], form: Blockwise
) -> QuantizedRows:
    """In the kernels' layout: codes [rows, blocks * block] or [rows, blocks, block], the others [rows, blocks]."""
    grouped = codes.reshape(*scales.shape, form.block)
    return QuantizedRows(_pack(grouped, form.bits), np.ascontiguousarray(scales), _pack(zero_points, form.bits))


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
