"""The header of a safetensors file, read with bounds [1].

Layout: 8 bytes little-endian header length, a JSON object of tensors, then their bytes without holes.

[1] https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError
from export.checkpoint import StoredTensor, TensorInfo
from export.files import DAMAGED, WeightFile, parse_object, shown

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_MAX_DIMS = 8


def _bf16(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    # bfloat16 is the upper half of a float32.
    widened = raw.view("<u2").astype(np.uint32)
    widened <<= 16
    return widened.view(np.float32)


def _f16(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    return raw.view("<f2").astype(np.float32)


def _f32(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    return raw.view("<f4").astype(np.float32, copy=False)


def _i32(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    return raw.view("<i4").astype(np.float32)


def _i64(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    return raw.view("<i8").astype(np.float32)


def _f8_e4m3(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _E4M3[raw]


def _e4m3_values() -> NDArray[np.float32]:
    """What each byte stands for: sign, 4 bits of exponent, 3 of mantissa; the largest of either sign is NaN [1].

    [1] Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433
    """
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    return np.where(byte & 127 == 127, np.nan, np.where(byte & 128, -size, size)).astype(np.float32)


_E4M3 = _e4m3_values()
FLOATS = frozenset({"BF16", "F16", "F32"})
"""Types of weights as such; all others are parts of quantized ones."""
_DTYPES: Mapping[str, tuple[int, Callable[[NDArray[np.uint8]], NDArray[np.float32]]]] = {
    "BF16": (2, _bf16),
    "F16": (2, _f16),
    "F32": (4, _f32),
    "I32": (4, _i32),
    "I64": (8, _i64),
    "F8_E4M3": (1, _f8_e4m3),
}
"""Bytes for one value, and how to decode them."""


def read_tensors(file: WeightFile) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file.

    Raises:
        CheckpointError: the header lies about lengths, offsets, shapes or types; the message names file and tensor.
    """
    header, data_start = _header(file)
    tensors, ends = {}, {}
    for name, entry in header.items():
        where = f"{file.path.name}: tensor {shown(name)}"
        info, begin, end = _entry(entry, where)
        ends[begin, end] = name
        itemsize, decode = _DTYPES[info.dtype]
        row_bytes = math.prod(info.shape[1:]) * itemsize
        tensors[name] = StoredTensor(info, file, data_start + begin, row_bytes, decode)
    _check_tiling(ends, file, data_start)
    if len(ends) != len(tensors):
        raise CheckpointError(f"{file.path.name}: two tensors share their bytes", hint=DAMAGED)
    return tensors


def _header(file: WeightFile) -> tuple[dict[str, Any], int]:
    name = file.path.name
    if file.size < 8:
        raise CheckpointError(f"{name} has {file.size} bytes: too short for a safetensors file", hint=DAMAGED)
    length = int(file.read(0, 8).view("<u8")[0])
    if length > min(MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointError(f"{name} claims a header of {length} bytes but has {file.size}", hint=DAMAGED)
    header = parse_object(file.read(8, length).tobytes(), f"the header of {name}")
    header.pop("__metadata__", None)
    return header, 8 + length


def _entry(entry: Any, where: str) -> tuple[TensorInfo, int, int]:
    """One entry of the header as (info, first byte, byte after the last)."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is described by {type(entry).__name__}, not an object", hint=DAMAGED)
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise unsupported(where, dtype)
    if not _is_naturals(shape) or not 1 <= len(shape) <= _MAX_DIMS or 0 in shape:
        raise CheckpointError(f"{where} has shape {shown(shape)}", hint=DAMAGED)
    if not _is_naturals(span) or len(span) != 2:
        raise CheckpointError(f"{where} has data_offsets {shown(span)}", hint=DAMAGED)
    begin, end = span
    needed = math.prod(shape) * _DTYPES[dtype][0]
    if end - begin != needed:
        message = f"{where}: {dtype} {shown(shape)} needs {needed} bytes, its offsets span {end - begin}"
        raise CheckpointError(message, hint=DAMAGED)
    return TensorInfo(tuple(shape), dtype), begin, end


def unsupported(where: str, dtype: Any) -> CheckpointError:
    """The error for a tensor whose type is none of weights."""
    hint = "use the original BF16, F16 or F32 checkpoint, or a GGUF"
    return CheckpointError(f"{where} has dtype {shown(dtype)}, which is not supported", hint=hint)


def _is_naturals(value: Any) -> TypeGuard[list[int]]:
    # The bound keeps products of hostile shapes small; no tensor comes near it.
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 48 for each in value)


def _check_tiling(spans: Mapping[tuple[int, int], str], file: WeightFile, data_start: int) -> None:
    """The format asks that tensors fill the data without holes or overlaps."""
    position = 0
    for (begin, end), name in sorted(spans.items()):
        if begin != position:
            what = "overlaps the one before" if begin < position else f"leaves a hole of {begin - position} bytes"
            raise CheckpointError(f"{file.path.name}: tensor {shown(name)} {what}", hint=DAMAGED)
        if end > file.size - data_start:
            message = f"{file.path.name}: tensor {shown(name)} ends at byte {data_start + end} of a file of {file.size}"
            raise CheckpointError(message, hint=DAMAGED)
        position = end
    if position != file.size - data_start:
        surplus = file.size - data_start - position
        raise CheckpointError(f"{file.path.name} has {surplus} bytes after its last tensor", hint=DAMAGED)


def open_shard(path: Path) -> tuple[WeightFile, dict[str, StoredTensor]]:
    """Open one safetensors file; it is closed again when its header is refused.

    Raises:
        CheckpointError: as :func:`read_tensors`, or the file cannot be opened.
    """
    file = WeightFile.open(path)
    try:
        return file, read_tensors(file)
    except CheckpointError:
        file.close()
        raise
