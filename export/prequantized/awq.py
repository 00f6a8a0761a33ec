"""AWQ as AutoAWQ stores it, version "gemm".

A matrix [out, in] is ``qweight`` [in, out / 8] int32, ``scales`` [groups, out] float16 and ``qzeros``
[groups, out / 8] int32. The eight integers of a word are outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError
from export.checkpoint import StoredTensor, Tensor, TensorInfo
from export.files import shown
from export.prequantized.grid import GridRows, GridTensor, Parts, column_floats, column_words, unpack
from export.safetensors_header import FLOATS

_BITS = 4
_PER_WORD = 8
_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word, from the lowest bits on, each of eight outputs stands."""


def read_awq(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors of an AWQ checkpoint under the names of the original.

    Raises:
        CheckpointError: the version is another one, or tensors do not fit together.
    """
    version = settings.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm" or settings.get("bits", _BITS) != _BITS:
        what = f"AWQ of version {shown(version)} with {shown(settings.get('bits'))} bits"
        raise CheckpointError(f"{what} is not supported", hint="supported: gemm with 4 bits")
    tensors: dict[str, Tensor] = dict(stored)
    for base in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        parts = Parts(base, stored)
        matrix = _matrix(parts)
        for taken in parts.names:
            del tensors[taken]
        tensors[f"{base}.weight"] = matrix
    return tensors


def _matrix(parts: Parts) -> GridTensor:
    weights, zeros = parts.take("qweight", ["I32"]), parts.take("qzeros", ["I32"])
    scales = parts.take("scales", FLOATS)
    (columns, words), (num_groups, rows) = weights.info.shape, scales.info.shape
    parts.check(words * _PER_WORD == rows and zeros.info.shape == (num_groups, words), "has parts that do not fit")
    parts.check(columns % num_groups == 0, f"has {num_groups} groups for {columns} columns")
    return GridTensor(
        info=TensorInfo((rows, columns), "AWQ_4"),
        file=weights.file,
        bits=_BITS,
        groups=np.arange(columns) // (columns // num_groups),
        read=_Packed(weights, zeros, scales).read,
    )


@dataclass(frozen=True)
class _Packed:
    """A matrix in AWQ's packing."""

    weights: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor

    def read(self, start: int, stop: int) -> GridRows:
        codes, zero_points = (_outputs(each, start, stop) for each in (self.weights, self.zeros))
        return GridRows(codes, column_floats(self.scales, start, stop), zero_points)


def _outputs(tensor: StoredTensor, start: int, stop: int) -> NDArray[np.uint8]:
    """Integers [stop - start, rows] of the outputs [start, stop)."""
    first = start // _PER_WORD
    words = column_words(tensor, first, -(-stop // _PER_WORD))
    values = unpack(words, _BITS)[..., _PLACES].reshape(len(words), -1)
    skipped = start - first * _PER_WORD
    return np.ascontiguousarray(values[:, skipped : skipped + stop - start].T)
