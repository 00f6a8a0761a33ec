"""A LoRA adapter on disk, as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors`` [1].

For a projection ``y = W x`` the adapter holds A [r, in] and B [out, r], and means ``y = W x + scale * B (A x)``. What
PEFT can write and this reader does not understand is refused, never skipped: an adapter that is applied in part answers
wrongly in silence.

[1] https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import AdapterError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""What an adapter may be called: what a model may."""
MAX_CONFIG_BYTES = 1 << 20
MAX_TENSOR_BYTES = 4 << 30
"""Ten times the largest adapter of a model that fits a small device."""
MAX_RANK = 512
LARGEST_VALUE = 65504.0
"""Float16's largest. In a shared step every adapter multiplies every row: what overflows would reach the others."""
_TENSOR_NAME = re.compile(
    r"base_model\.model\.model\.(?:language_model\.)?layers\.(\d{1,4})\.(?:self_attn|linear_attn|mlp)\.(\w+)"
    r"\.lora_([AB])\.weight"
)
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_OFF: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(
        (
            "alora_invocation_tokens", "alpha_pattern", "arrow_config", "fan_in_fan_out", "layer_replication",
            "lora_bias", "modules_to_save", "rank_pattern", "target_parameters", "trainable_token_indices",
            "use_bdlora", "use_dora", "use_qalora",
        ),
        (False,),
    ),
}  # fmt: skip
"""Settings that change what an adapter computes, and the values of plain LoRA beside absent, null and empty."""

Place = tuple[int, str]
"""Layer, and projection such as ``q_proj``."""
Array = NDArray[np.float32]


@dataclass(frozen=True)
class AdapterConfig:
    """What ``adapter_config.json`` says."""

    rank: int
    scale: float
    """Of B A: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rank-stabilized LoRA."""


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter that was read."""

    rank: int
    pairs: Mapping[Place, tuple[Array, Array]]
    """A [r, in] and B [out, r] with the scale in it, of every projection that is adapted."""
    digest: str
    """Names what it computes: SHA-256 of file and scale, in hexadecimal."""


def read_config(path: Path) -> AdapterConfig:
    """Read an ``adapter_config.json``.

    Raises:
        AdapterError: it is missing or malformed, or asks for more than plain LoRA.
    """
    raw = _read(path, MAX_CONFIG_BYTES)
    config = _json_object(raw, path.name)
    if config.get("peft_type") != "LORA":
        hint = "only LoRA adapters are supported"
        raise AdapterError(f"{path} has peft_type {_shown(config.get('peft_type'))}", hint=hint)
    for key, allowed in _OFF.items():
        value = config.get(key)
        if value and value not in allowed:
            hint = "train a plain LoRA adapter, or merge it into the model before the export"
            raise AdapterError(f"{path} has {key} {_shown(value)}, which is not supported", hint=hint)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not 0 < rank <= MAX_RANK:
        raise AdapterError(f"{path} has r {_shown(rank)}", hint=f"ranks from 1 to {MAX_RANK} are supported")
    if not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST_VALUE:
        raise AdapterError(f"{path} has lora_alpha {_shown(alpha)}, not a number", hint=_DAMAGED)
    return AdapterConfig(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def read_adapter(path: Path, config: AdapterConfig, sizes: Mapping[Place, tuple[int, int]]) -> AdapterFile:
    """Read an ``adapter_model.safetensors`` whole, as float32.

    Args:
        path: the file.
        config: of the adapter.
        sizes: in and out features of every projection of the model.

    Raises:
        AdapterError: the file is missing or malformed, holds other tensors than LoRA's, or belongs to another model.
    """
    raw = _read(path, MAX_TENSOR_BYTES)
    tensors = _tensors(raw, path.name)
    found: dict[tuple[int, str, str], Array] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or (int(match[1]), match[2]) not in sizes:
            raise AdapterError(f"{path.name}: {_shown(name)} has no place in this model", hint=_OTHER_MODEL)
        found[int(match[1]), match[2], match[3]] = tensor
    if not found:
        raise AdapterError(f"{path.name} holds no tensors", hint=_DAMAGED)
    pairs = {place: _pair(found, place, config, sizes[place], path.name) for place in {key[:2] for key in found}}
    digest = hashlib.sha256(raw)
    digest.update(repr(config.scale).encode())
    return AdapterFile(config.rank, pairs, digest.hexdigest())


_DAMAGED = "fetch or save the adapter again"
_OTHER_MODEL = "was the adapter trained on another model, or does it adapt more than the projections of the layers?"


def _pair(
    found: Mapping[tuple[int, str, str], Array],
    place: Place,
    config: AdapterConfig,
    size: tuple[int, int],
    file: str,
) -> tuple[Array, Array]:
    """A and scaled B of one projection, checked."""
    (columns, rows), rank = size, config.rank
    result = []
    for letter, shape, scale in (("A", (rank, columns), 1.0), ("B", (rows, rank), config.scale)):
        tensor = found.get((*place, letter))
        where = f"{file}: lora_{letter} of {place[1]} in layer {place[0]}"
        if tensor is None:
            raise AdapterError(f"{where} is missing", hint=_DAMAGED)
        if tensor.shape != shape:
            raise AdapterError(f"{where} is {list(tensor.shape)} instead of {list(shape)}", hint=_OTHER_MODEL)
        scaled = tensor * np.float32(scale)
        # Not "larger than": NaN is not.
        if not np.abs(scaled).max() <= LARGEST_VALUE:
            raise AdapterError(f"{where} holds NaN, infinity or values beyond {LARGEST_VALUE:g}", hint=_DAMAGED)
        result.append(scaled)
    return result[0], result[1]


def _read(path: Path, most: int) -> bytes:
    """A regular file whole."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > most:
            raise AdapterError(f"{path} is no file of at most {most} bytes", hint=_DAMAGED)
        return path.read_bytes()
    except OSError as error:
        hint = f"an adapter is a folder with {CONFIG} and {TENSORS}"
        raise AdapterError(f"{path} cannot be read: {error.strerror}", hint=hint) from None


def _tensors(raw: bytes, file: str) -> dict[str, Array]:
    """The tensors of a safetensors file: header length, JSON header, then their bytes without holes."""
    start = 8 + int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or start > len(raw):
        raise AdapterError(f"{file} is cut short", hint=_DAMAGED)
    header = _json_object(raw[8:start], f"the header of {file}")
    header.pop("__metadata__", None)
    tensors, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        try:
            dtype, (rows, columns), (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            size = rows * columns * _ITEM_BYTES[dtype]
            plain = all(type(value) is int and value >= 0 for value in (rows, columns, begin, end))
        except (KeyError, TypeError, ValueError):
            hint = "save it in float32, float16 or bfloat16"
            raise AdapterError(f"{file}: {_shown(name)} is described wrongly", hint=hint) from None
        if not plain or not size or (begin, end) != (position, position + size) or start + end > len(raw):
            raise AdapterError(f"{file}: {_shown(name)} has wrong offsets or shape", hint=_DAMAGED)
        tensors[name] = _float32(raw[start + begin : start + end], dtype).reshape(rows, columns)
        position = end
    if start + position != len(raw):
        raise AdapterError(f"{file} has bytes after its last tensor", hint=_DAMAGED)
    return tensors


def _begin(entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if isinstance(offsets, list) and offsets and type(offsets[0]) is int else -1


def _float32(raw: bytes, dtype: str) -> Array:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def _json_object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise AdapterError(f"{what} is no JSON object", hint=_DAMAGED)
    return value


def _shown(value: Any) -> str:
    """A value of somebody else's file, short enough for a message."""
    return repr(value)[:80]
