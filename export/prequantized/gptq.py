"""GPTQ as AutoGPTQ and GPTQModel store it, versions 1 and 2.

A matrix [out, in] is ``qweight`` [in * bits / 32, out] int32, ``scales`` [groups, out] float16, ``qzeros``
[groups, out * bits / 32] int32 and ``g_idx`` [in] int32, the group of each column. In version 1 (``checkpoint_format``
"gptq", or none) the zero points are stored less one, as words: what a zero borrows from its neighbour is given back by
adding words, too.
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
    column_floats,
    column_groups,
    column_words,
    unpack,
)
from export.safetensors_header import FLOATS

_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` → what is to be added to stored zero points."""


def read_gptq(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors of a GPTQ checkpoint under the names of the original.

    Raises:
        CheckpointError: the format is another one, or tensors do not fit together.
    """
    name = settings.get("checkpoint_format") or "gptq"
    if not isinstance(name, str) or name not in _FORMATS:
        hint = f"supported: {', '.join(_FORMATS)}"
        raise CheckpointError(f"GPTQ in the format {shown(name)} is not supported", hint=hint)
    tensors: dict[str, Tensor] = dict(stored)
    for base in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        parts = Parts(base, stored)
        matrix = _matrix(parts, _FORMATS[name], in_order=settings.get("desc_act") is not True)
        bias = stored.get(f"{base}.bias")
        for taken in parts.names:
            del tensors[taken]
        if bias is not None and _is_superfluous(base, bias):
            del tensors[f"{base}.bias"]
        tensors[f"{base}.weight"] = matrix
    return tensors


def _matrix(parts: Parts, zero_offset: int, *, in_order: bool) -> GridTensor:
    weights, zeros = parts.take("qweight", ["I32"]), parts.take("qzeros", ["I32"])
    scales = parts.take("scales", FLOATS)
    num_groups, rows = scales.info.shape
    parts.check(weights.info.shape[1] == rows and zeros.info.shape[0] == num_groups, "has parts that do not fit")
    # GPTQModel can give matrices bits of their own; their shapes say it of each.
    bits = check_bits(parts, WORD_BITS * zeros.info.shape[1] / rows)
    columns = weights.info.shape[0] * WORD_BITS // bits
    return GridTensor(
        info=TensorInfo((rows, columns), f"GPTQ_{bits}"),
        file=weights.file,
        bits=bits,
        groups=column_groups(parts, "g_idx", columns, num_groups, in_order=in_order),
        read=_Packed(weights, zeros, scales, bits, zero_offset).read,
    )


@dataclass(frozen=True)
class _Packed:
    """A matrix in GPTQ's packing."""

    weights: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    bits: int
    zero_offset: int
    """What is to be added to stored zero points."""

    def read(self, start: int, stop: int) -> GridRows:
        codes = unpack(column_words(self.weights, start, stop), self.bits)  # [in / per word, rows, per word]
        codes = codes.transpose(1, 0, 2).reshape(stop - start, -1)
        per_word = WORD_BITS // self.bits
        first = start // per_word
        words = column_words(self.zeros, first, -(-stop // per_word))
        ones = sum(self.zero_offset << shift for shift in range(0, WORD_BITS, self.bits))
        zero_points = unpack(words + np.uint32(ones), self.bits).reshape(len(words), -1)
        skipped = start - first * per_word
        zero_points = zero_points[:, skipped : skipped + stop - start].T
        return GridRows(codes, column_floats(self.scales, start, stop), zero_points)


def _is_superfluous(base: str, bias: StoredTensor) -> bool:
    """Whether it is one of zeros for a matrix that has none in any model, as some checkpoints store them."""
    return not base.endswith(("q_proj", "k_proj", "v_proj")) and not bias.rows(0, bias.info.shape[0]).any()
