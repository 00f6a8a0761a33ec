"""Integer weights as compressed-tensors packs them, format "pack-quantized" (W4A16 and W8A16).

A matrix [out, in] is ``weight_packed`` [out, in * bits / 32] int32, ``weight_scale`` [out, groups], ``weight_shape``
[2] int64 and, where it is not symmetric, ``weight_zero_point`` [out * bits / 32, groups] int32. Codes and zero points
are stored plus half their range. ``weight_g_idx`` [in] int32 has the group of each column where these are not in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.errors import CheckpointError
from export.checkpoint import StoredTensor, Tensor, TensorInfo
from export.files import shown
from export.prequantized.grid import (
    WORD_BITS,
    GridRows,
    GridTensor,
    Parts,
    check_bits,
    column_groups,
    row_words,
    unpack,
    whole_vector,
)
from export.safetensors_header import FLOATS

_PACKED = ".weight_packed"


def read_compressed(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors of a compressed-tensors checkpoint under the names of the original.

    Raises:
        CheckpointError: the format is another one, or tensors do not fit together.
    """
    name = settings.get("format")
    if name != "pack-quantized":
        hint = "supported: pack-quantized (W4A16, W8A16)"
        raise CheckpointError(f"compressed-tensors in the format {shown(name)} is not supported", hint=hint)
    tensors: dict[str, Tensor] = dict(stored)
    for base in [name.removesuffix(_PACKED) for name in stored if name.endswith(_PACKED)]:
        parts = Parts(base, stored)
        matrix = _matrix(parts)
        for taken in parts.names:
            del tensors[taken]
        tensors[f"{base}.weight"] = matrix
    return tensors


def _matrix(parts: Parts) -> GridTensor:
    weights, scales = parts.take("weight_packed", ["I32"]), parts.take("weight_scale", FLOATS)
    zeros = parts.find("weight_zero_point", ["I32"])
    sizes = parts.take("weight_shape", ["I64"], 1)
    parts.check(sizes.info.shape == (2,), "has a weight_shape that is none of a matrix")
    rows, columns = whole_vector(sizes, "<i8").tolist()
    parts.check(rows > 0 and columns > 0, f"has the weight_shape {[rows, columns]}")
    bits = check_bits(parts, WORD_BITS * weights.info.shape[1] / columns)
    num_groups = scales.info.shape[1]
    fits = weights.info.shape[0] == scales.info.shape[0] == rows
    if zeros is not None:
        fits = fits and zeros.info.shape == (-(-rows * bits // WORD_BITS), num_groups)
    parts.check(fits, "has parts that do not fit")
    return GridTensor(
        info=TensorInfo((rows, columns), f"INT_{bits}"),
        file=weights.file,
        bits=bits,
        groups=column_groups(parts, "weight_g_idx", columns, num_groups),
        read=_Packed(weights, zeros, scales, bits).read,
    )


@dataclass(frozen=True)
class _Packed:
    """A matrix in this packing."""

    weights: StoredTensor
    zeros: StoredTensor | None
    scales: StoredTensor
    bits: int

    def read(self, start: int, stop: int) -> GridRows:
        codes = unpack(row_words(self.weights, start, stop), self.bits).reshape(stop - start, -1)
        scales = self.scales.rows(start, stop)
        if self.zeros is None:
            return GridRows(codes, scales, np.full(scales.shape, 1 << (self.bits - 1), np.uint8))
        per_word = WORD_BITS // self.bits
        first = start // per_word
        packed = unpack(row_words(self.zeros, first, -(-stop // per_word)), self.bits)  # [words, groups, per word]
        zero_points = packed.swapaxes(1, 2).reshape(-1, scales.shape[1])
        skipped = start - first * per_word
        return GridRows(codes, scales, zero_points[skipped : skipped + stop - start])
