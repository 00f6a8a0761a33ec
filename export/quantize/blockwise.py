"""Blockwise quantization, to nearest, in the layout of onnxruntime's MatMulNBits and GatherBlockQuantized.

Layout (onnxruntime ContribOperators.md, MatMulNBits): codes [rows, blocks, block * bits / 8] uint8 with the low nibble
first, scales [rows, blocks] float32, zero points [rows, ceil(blocks * bits / 8)] uint8 packed the same way, or none,
which stands for half of the codes. Rows are independent of each other, so a matrix quantized chunk by chunk equals the
matrix quantized whole.

Scales are chosen among the numbers of float16, so that they can be stored in half of the bytes.
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
    zero_points: NDArray[np.uint8] | None  # [rows, ceil(blocks * bits / 8)]; None where the format is symmetric


def quantize_rows(weights: NDArray[np.float32], form: Blockwise) -> QuantizedRows:
    """Quantize ``weights`` [rows, columns] to nearest; columns are padded with zeros to whole blocks."""
    grouped = _grouped(weights, form.block)
    scales, zero_points = block_grid(grouped, form)
    codes = _nearest(grouped, scales, zero_points, form.bits)
    return pack_rows(codes, scales, zero_points, form)


def block_grid(weights: NDArray[np.float32], form: Blockwise) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scales and zero points of the grids that span ``weights`` [..., block]: both [...]."""
    # Zero lies inside the range, so that it is exact and the zero point fits.
    low = np.minimum(weights.min(axis=-1), 0.0)
    high = np.maximum(weights.max(axis=-1), 0.0)
    top = float(2**form.bits - 1)
    half = float(2 ** (form.bits - 1))
    # Divided before they are subtracted: the range of two large floats is none.
    wanted = np.maximum(high / (half - 1), -low / half) if form.symmetric else high / top - low / top
    # And no code may stand for more than the largest float.
    furthest = half if form.symmetric else top + 1
    scales = _as_float16(np.minimum(wanted, np.finfo(np.float32).max / furthest))
    if form.symmetric:
        return scales, np.full(scales.shape, half, np.uint8)
    return scales, np.minimum(np.rint(-low * _inverse(scales)), top).astype(np.uint8)


def quantize_halves(weights: NDArray[np.float32], block: int) -> tuple[QuantizedRows, QuantizedRows]:
    """Quantize ``weights`` [rows, columns] to 8 bits, and take the codes apart into two matrices of 4 bits.

    The upper halves of the codes are a coarse copy. The lower ones, in a symmetric format with the same scales, are 16
    times what the copy lacks: the 8-bit zero points are 16 times the copy's and 8, so cutting a code off rounds it.
    """
    grouped = _grouped(weights, block)
    scales, zero_points = _halves_grid(grouped)
    fine = np.divide(scales, 16, dtype=np.float32)
    codes = _nearest(grouped, fine, 16 * zero_points + np.uint8(8), bits=8)
    upper, lower = np.divmod(codes, np.uint8(16))
    coarse = pack_rows(upper, scales, zero_points, Blockwise(4, block))
    return coarse, pack_rows(lower, scales, zero_points, Blockwise(4, block, symmetric=True))


def _halves_grid(weights: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scales and zero points of the upper halves for ``weights`` [..., block]: both [...]."""
    low = np.minimum(weights.min(axis=-1), 0.0).astype(np.float64)
    high = np.maximum(weights.max(axis=-1), 0.0).astype(np.float64)
    # Where both ends of the range would touch those of the codes, -low / (16 z + 8) = high / (247 - 16 z).
    tiny = np.finfo(np.float32).tiny
    ideal = (-247 * low - 8 * high) / (16 * np.maximum(high - low, tiny))
    below, above = (np.clip(round_(ideal), 0, 15) for round_ in (np.floor, np.ceil))
    steps = [np.maximum(-low / (16 * z + 8), high / (247 - 16 * z)) for z in (below, above)]
    zero_points = np.where(steps[0] <= steps[1], below, above).astype(np.uint8)
    limit = np.finfo(np.float32).max / 16
    return _as_float16(np.minimum(16 * np.minimum(*steps), limit).astype(np.float32)), zero_points


def _as_float16(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The next numbers up that float16 has; beyond its range as they are."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    halves = np.where(halves < scales, np.nextafter(halves, np.float16(np.inf)), halves)
    return np.where(np.isfinite(halves), halves, scales).astype(np.float32)


def _inverse(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)


def _grouped(weights: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """``weights`` [rows, columns] in blocks [rows, blocks, block], the last one filled with zeros."""
    rows, columns = weights.shape
    blocks = -(-columns // block)
    if columns != blocks * block:
        weights = np.pad(weights, ((0, 0), (0, blocks * block - columns)))
    return weights.reshape(rows, blocks, block)


def _nearest(
    grouped: NDArray[np.float32], scales: NDArray[np.float32], zero_points: NDArray[np.uint8], bits: int
) -> NDArray[np.uint8]:
    """Codes [rows, blocks, block] of the grids' values that are nearest to ``grouped``."""
    codes = grouped * _inverse(scales)[:, :, None]
    codes += zero_points[:, :, None]
    np.rint(codes, out=codes)
    np.clip(codes, 0.0, 2**bits - 1, out=codes)
    return codes.astype(np.uint8)


def pack_rows(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], zero_points: NDArray[np.uint8], form: Blockwise
) -> QuantizedRows:
    """In the kernels' layout: codes [rows, blocks * block] or [rows, blocks, block], the others [rows, blocks]."""
    grouped = codes.reshape(*scales.shape, form.block)
    packed_zeros = None if form.symmetric else _pack(zero_points, form.bits)
    return QuantizedRows(_pack(grouped, form.bits), np.ascontiguousarray(scales), packed_zeros)


def dequantize_rows(quantized: QuantizedRows, form: Blockwise, columns: int) -> NDArray[np.float32]:
    """The float32 values [rows, columns] that the codes stand for."""
    rows, blocks = quantized.scales.shape
    codes = _unpack(quantized.codes, form.bits).astype(np.float32)
    if quantized.zero_points is None:
        codes -= 2 ** (form.bits - 1)
    else:
        codes -= _unpack(quantized.zero_points, form.bits)[:, :blocks, None]
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
