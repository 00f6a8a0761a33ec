"""FP8 in blocks, as Qwen and DeepSeek publish it.

A matrix [out, in] is ``weight`` in float8_e4m3fn and ``weight_scale_inv``, one factor for each block of, mostly,
[128, 128]. Kernels have no such format: the products are read as float32 and follow the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError
from export.checkpoint import StoredTensor, Tensor, TensorInfo
from export.files import WeightFile, shown
from export.prequantized.grid import Parts
from export.safetensors_header import FLOATS

_SCALE = "weight_scale_inv"


def read_fp8(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors of an FP8 checkpoint under the names of the original.

    Raises:
        CheckpointError: the format is another one, or tensors do not fit together.
    """
    block = _block(settings)
    tensors: dict[str, Tensor] = dict(stored)
    for base in [name.removesuffix(f".{_SCALE}") for name in stored if name.endswith(f".{_SCALE}")]:
        parts = Parts(base, stored)
        weights, scales = parts.take("weight", ["F8_E4M3"]), parts.take(_SCALE, FLOATS)
        blocks = tuple(-(-size // width) for size, width in zip(weights.info.shape, block, strict=True))
        parts.check(scales.info.shape == blocks, f"has {shown(list(scales.info.shape))} blocks, not {list(blocks)}")
        del tensors[f"{base}.{_SCALE}"]
        tensors[f"{base}.weight"] = _Scaled(weights, scales, block)
    return tensors


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block."""
    block = settings.get("weight_block_size")
    sizes = isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block)
    if not sizes or settings.get("fmt", "e4m3") != "e4m3":
        what = f"FP8 of format {shown(settings.get('fmt'))} with weight_block_size {shown(block)}"
        raise CheckpointError(f"{what} is not supported", hint="supported: e4m3 in blocks, as Qwen publishes it")
    assert isinstance(block, list)
    return block[0], block[1]


@dataclass(frozen=True)
class _Scaled:
    """A matrix of products."""

    weights: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    @property
    def info(self) -> TensorInfo:
        return self.weights.info

    @property
    def file(self) -> WeightFile:
        return self.weights.file

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        height, width = self.block
        first = start // height
        scales = self.scales.rows(first, -(-stop // height))
        of_rows = scales[np.arange(start, stop) // height - first]
        values = self.weights.rows(start, stop)
        # A damaged factor may be infinite; the export's own checks see what comes of it.
        with np.errstate(all="ignore"):
            values *= of_rows[:, np.arange(self.info.shape[1]) // width]
        return values
