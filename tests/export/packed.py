"""Quantized checkpoints written by the letter of their formats, integer by integer, with the values they stand for.

model = packed.write_folder(tmp_path / "m", tiny.qwen2_config(), packed.gptq, {"quant_method": "gptq", ...})
model.values["model.layers.0.mlp.down_proj.weight"]  # float32, what the reference formula makes of the integers
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from numpy.typing import NDArray

from tests.export import tiny

Array = NDArray[Any]
Parts = dict[str, Array]
_DTYPES = {"float32": "float32", "float16": "float16", "int32": "int32", "int64": "int64", "uint8": "float8_e4m3fn"}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Grid:
    """A matrix [out, in] on a grid of groups."""

    codes: NDArray[np.int64]  # [out, in]
    zeros: NDArray[np.int64]  # [out, groups]
    scales: NDArray[np.float16]  # [out, groups]
    groups: NDArray[np.int64]  # [in]
    bits: int

    def values(self) -> NDArray[np.float32]:
        """``scale * (code - zero)``, one product for each weight."""
        exact = self.scales[:, self.groups].astype(np.float64) * (self.codes - self.zeros[:, self.groups])
        return exact.astype(np.float32)


@dataclass(frozen=True)
class Model:
    """A folder that was written."""

    folder: Path
    values: tiny.Tensors
    """Every tensor as the original model has it."""


Pack = Callable[[Grid], Parts]
Group = Callable[[str, int], NDArray[np.int64]]


def in_groups(size: int) -> Group:
    """Groups of neighbouring columns."""
    return lambda _, columns: np.arange(columns) // size


def shuffled(size: int) -> Group:
    """Groups of columns from all over the matrix, the same for matrices with one input, as ``desc_act`` makes them."""

    def group(name: str, columns: int) -> NDArray[np.int64]:
        what_it_reads = {"o_proj": 1, "down_proj": 2, "gate_proj": 3, "up_proj": 3}
        kind = next((number for part, number in what_it_reads.items() if part in name), 0)
        return np.random.default_rng(kind).permutation(np.arange(columns) // size)

    return group


def random_grid(seed: int, shape: tuple[int, ...], bits: int, groups: NDArray[np.int64], *, symmetric: bool) -> Grid:
    """Any integers, extremes among them; zero points of 1 and more, as version 1 of GPTQ can store them."""
    rng = np.random.default_rng(seed)
    top, num_groups = 2**bits, int(groups.max()) + 1
    codes = rng.integers(0, top, shape)
    zeros = rng.integers(1, top, (shape[0], num_groups)) if not symmetric else np.full((shape[0], num_groups), top // 2)
    scales = (rng.uniform(0.5, 1.5, (shape[0], num_groups)) * 0.4 / top).astype(np.float16)
    return Grid(codes, zeros, scales, groups, bits)


def pack(codes: Array, bits: int, order: Sequence[int] | None = None) -> NDArray[np.int32]:
    """Integers [..., n] as words [..., n * bits / 32]; ``order`` of the integers of a word, from the low bits."""
    per_word = 32 // bits
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // per_word), np.uint64)
    for place, which in enumerate(order or range(per_word)):
        words |= codes[..., which::per_word].astype(np.uint64) << np.uint64(place * bits)
    return words.astype(np.uint32).view(np.int32)


def gptq(grid: Grid, version: int = 1) -> Parts:
    """qweight, qzeros, scales and g_idx."""
    # A word less a one in every place, as GPTQModel converts version 2 to 1.
    ones = sum(1 << shift for shift in range(0, 32, grid.bits)) if version == 1 else 0
    return {
        "qweight": np.ascontiguousarray(pack(grid.codes, grid.bits).T),
        "qzeros": (pack(grid.zeros.T, grid.bits).view(np.uint32) - np.uint32(ones)).view(np.int32),
        "scales": np.ascontiguousarray(grid.scales.T),
        "g_idx": grid.groups.astype(np.int32),
    }


def gptq_v2(grid: Grid) -> Parts:
    """The same with zero points as they are."""
    return gptq(grid, version=2)


def awq(grid: Grid) -> Parts:
    """qweight, qzeros and scales."""
    return {
        "qweight": pack(np.ascontiguousarray(grid.codes.T), 4, AWQ_ORDER),
        "qzeros": pack(np.ascontiguousarray(grid.zeros.T), 4, AWQ_ORDER),
        "scales": np.ascontiguousarray(grid.scales.T),
    }


def compressed(grid: Grid) -> Parts:
    """weight_packed, weight_scale, weight_shape, and weight_zero_point and weight_g_idx where they say something."""
    parts: Parts = {
        "weight_packed": pack(grid.codes, grid.bits),
        "weight_scale": grid.scales,
        "weight_shape": np.array(grid.codes.shape),
    }
    if (grid.zeros != 1 << (grid.bits - 1)).any():
        parts["weight_zero_point"] = pack(grid.zeros.T, grid.bits).T
    if (np.diff(grid.groups) < 0).any():
        parts["weight_g_idx"] = grid.groups.astype(np.int32)
    return parts


IN_GROUPS_OF_32 = in_groups(32)


def as_it_is(_: str, grid: Grid) -> Grid:
    """No change."""
    return grid


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    write: Pack,
    settings: Mapping[str, Any],
    *,
    bits: int = 4,
    symmetric: bool = False,
    group: Group = IN_GROUPS_OF_32,
    change: Callable[[str, Grid], Grid] = as_it_is,
) -> Model:
    """A folder whose projections are quantized, all else in float32.

    Args:
        folder: created.
        config: of the model.
        write: packs one matrix.
        settings: ``quantization_config``.
        bits: of the integers.
        symmetric: whether all zero points are in the middle.
        group: groups of a matrix, by name and number of columns.
        change: what to make of a grid before it is written.
    """
    tiny.write_folder(folder, config)
    values = tiny.random_tensors(config)
    stored: Parts = {}
    for seed, (name, tensor) in enumerate(list(values.items())):
        if not name.endswith("_proj.weight") or "visual" in name or "mtp" in name:
            stored[name] = tensor
            continue
        grid = random_grid(seed, tensor.shape, bits, group(name, tensor.shape[1]), symmetric=symmetric)
        grid = change(name, grid)
        values[name] = grid.values()
        stored |= {f"{name.removesuffix('.weight')}.{part}": array for part, array in write(grid).items()}
    return _finish(folder, stored, values, settings)


def write_fp8(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], *, scales: str = "float32"
) -> Model:
    """A folder whose projections are float8_e4m3fn with a factor for each block of ``weight_block_size``."""
    tiny.write_folder(folder, config)
    values = tiny.random_tensors(config)
    stored: Parts = {}
    rng = np.random.default_rng(0)
    height, width = settings["weight_block_size"]
    for name, tensor in list(values.items()):
        stored[name] = tensor
        if not name.endswith("_proj.weight") or "visual" in name or "mtp" in name:
            continue
        # Every value there is but the two NaN.
        codes = rng.integers(0, 127, tensor.shape) + 128 * rng.integers(0, 2, tensor.shape)
        stored[name] = codes.astype(np.uint8)
        rows, columns = tensor.shape
        factors = rng.uniform(1e-4, 1e-3, (-(-rows // height), -(-columns // width))).astype(scales)
        stored[f"{name}_scale_inv"] = factors
        spread = factors.astype(np.float32).repeat(height, 0)[:rows].repeat(width, 1)[:, :columns]
        values[name] = stored[name].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * spread
    return _finish(folder, stored, values, settings)


def _finish(folder: Path, stored: Parts, values: tiny.Tensors, settings: Mapping[str, Any]) -> Model:
    write_tensors(folder / "model.safetensors", stored)
    content = json.loads((folder / "config.json").read_text())
    tiny.write_json(folder / "config.json", content | {"quantization_config": dict(settings)})
    return Model(folder, values)


def write_tensors(path: Path, tensors: Parts) -> None:
    """Arrays in a safetensors file, by the official library; uint8 is the bits of float8_e4m3fn."""
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=_DTYPES[array.dtype.name], shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    safetensors.serialize_file(specs, path, metadata={"format": "pt"})


def read_tensors(path: Path) -> Parts:
    """The arrays of a file that :func:`write_tensors` wrote."""
    types = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I64": np.int64, "F8_E4M3": np.uint8}
    entries = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    return {
        name: np.frombuffer(entry["data"], types[entry["dtype"]]).reshape(entry["shape"]) for name, entry in entries
    }
