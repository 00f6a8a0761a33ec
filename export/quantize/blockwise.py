"""Blockwise quantization, to nearest, in the layout of onnxruntime's MatMulNBits and GatherBlockQuantized.

Layout (onnxruntime ContribOperators.md, MatMulNBits): codes [rows, blocks, block * bits / 8] uint8, the first code of a
byte lowest; scales [rows, blocks] float32; zero points [rows, ceil(blocks * bits / 8)] uint8 packed the same way, or
none, which stands for half of the codes. Rows are independent of each other, so a matrix quantized chunk by chunk
equals the matrix quantized whole.

Scales are chosen among the numbers of float16, so that they can be stored in half of the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from export.quantize.recipes import COARSE_BITS, Blockwise


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


def quantize_split(weights: NDArray[np.float32], form: Blockwise) -> tuple[QuantizedRows, QuantizedRows]:
    """Quantize ``weights`` [rows, columns], and take the codes apart into a matrix of their upper 4 bits and the rest.

    The upper bits are a coarse copy. The lower ones, in a symmetric format with the same scales, are what the copy
    lacks, times their number of codes: the zero points of the whole codes are those of the copy, followed by a one and
    zeros, so cutting a code off rounds it.
    """
    copy, rest = split_forms(form)
    parts = np.uint8(2**rest.bits)
    grouped = _grouped(weights, form.block)
    scales, zero_points = _split_grid(grouped, int(parts))
    fine = np.divide(scales, parts, dtype=np.float32)
    codes = _nearest(grouped, fine, parts * zero_points + parts // np.uint8(2), form.bits)
    upper, lower = np.divmod(codes, parts)
    return pack_rows(upper, scales, zero_points, copy), pack_rows(lower, scales, zero_points, rest)


def split_forms(form: Blockwise) -> tuple[Blockwise, Blockwise]:
    """Formats of the two matrices that :func:`quantize_split` makes."""
    return Blockwise(COARSE_BITS, form.block), replace(form, bits=form.bits - COARSE_BITS, symmetric=True)


def _split_grid(weights: NDArray[np.float32], parts: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scales and zero points of the upper bits for ``weights`` [..., block], a step of them in so many parts."""
    low = np.minimum(weights.min(axis=-1), 0.0).astype(np.float64)
    high = np.maximum(weights.max(axis=-1), 0.0).astype(np.float64)
    # Where both ends of the range would touch those of the codes, -low / (parts z + half) = high / (top - parts z).
    half = parts // 2
    top = 2**COARSE_BITS * parts - 1 - half
    tiny = np.finfo(np.float32).tiny
    ideal = (-top * low - half * high) / (parts * np.maximum(high - low, tiny))
    below, above = (np.clip(round_(ideal), 0, 2**COARSE_BITS - 1) for round_ in (np.floor, np.ceil))
    steps = [np.maximum(-low / (parts * z + half), high / (top - parts * z)) for z in (below, above)]
    zero_points = np.where(steps[0] <= steps[1], below, above).astype(np.uint8)
    limit = np.finfo(np.float32).max / 2**COARSE_BITS
    return _as_float16(np.minimum(parts * np.minimum(*steps), limit).astype(np.float32)), zero_points


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
    """Pack along the last axis into bytes, the first code lowest; the last byte is padded with zeros."""
    if bits == 8:
        return codes
    if odd := codes.shape[-1] % (8 // bits):
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 8 // bits - odd)])
    packed = codes[..., 0 :: 8 // bits].copy()
    for i in range(1, 8 // bits):
        packed |= np.left_shift(codes[..., i :: 8 // bits], i * bits, dtype=np.uint8)
    return packed


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * (8 // bits)), dtype=np.uint8)
    for i in range(8 // bits):
        codes[..., i :: 8 // bits] = packed >> (i * bits) & (2**bits - 1)
    return codes
