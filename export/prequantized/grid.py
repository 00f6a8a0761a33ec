"""Weights that a checkpoint stores as integers on a grid, ``w = (code - zero_point) * scale``.

The grids of GPTQ, AWQ and compressed-tensors are those of MatMulNBits: only the packing differs. So the integers can be
kept as they are. Where groups hold columns from all over the matrix (GPTQ with ``desc_act``), the columns are sorted by
group, and the graph sorts the inputs alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError
from export.checkpoint import StoredTensor, Tensor, TensorInfo
from export.files import DAMAGED, WeightFile, shown
from export.quantize.blockwise import QuantizedRows, pack_rows
from export.quantize.recipes import Blockwise

WORD_BITS = 32
_LEAST_BLOCK, _MOST_BLOCK = 32, 128


@dataclass(frozen=True)
class GridRows:
    """Some rows of a matrix on its grid."""

    codes: NDArray[np.uint8]  # [rows, columns]
    scales: NDArray[np.float32]  # [rows, groups]
    zero_points: NDArray[np.uint8]  # [rows, groups]


@dataclass(frozen=True)
class GridLayout:
    """How the kernels can take a grid."""

    form: Blockwise
    order: NDArray[np.int64] | None
    """Column of the matrix at each place; None = as they are."""

    def equals(self, other: GridLayout | None) -> bool:
        """Whether rows in both layouts can be stacked."""
        if other is None or self.form != other.form:
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return np.array_equal(self.order, other.order)


@dataclass(frozen=True)
class GridTensor:
    """A matrix that a checkpoint stores as integers."""

    info: TensorInfo
    file: WeightFile
    bits: int
    """4 or 8."""
    groups: NDArray[np.int64]
    """Group of each column."""
    read: Callable[[int, int], GridRows]
    """Rows [start, stop)."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32, exact: the product of a small integer and a float16."""
        grid = self.read(start, stop)
        values = grid.codes.astype(np.float32)
        values -= grid.zero_points[:, self.groups]
        values *= grid.scales[:, self.groups]
        return values

    def layout(self) -> GridLayout | None:
        """The layout in which kernels take it; None where groups differ in size or have no usable one."""
        sizes = np.bincount(self.groups)
        group = int(sizes[0])
        block = min(group & -group, _MOST_BLOCK)
        if (sizes != group).any() or block < _LEAST_BLOCK:
            return None
        order = np.argsort(self.groups, kind="stable")
        sorted_already = bool((np.diff(order) == 1).all())
        return GridLayout(Blockwise(self.bits, block), None if sorted_already else order)

    def packed(self, start: int, stop: int, layout: GridLayout) -> QuantizedRows:
        """Rows [start, stop) as the kernels want them; blocks that are smaller than groups share a scale."""
        grid = self.read(start, stop)
        codes = grid.codes if layout.order is None else grid.codes[:, layout.order]
        times = codes.shape[1] // layout.form.block // grid.scales.shape[1]
        scales, zero_points = np.repeat(grid.scales, times, axis=1), np.repeat(grid.zero_points, times, axis=1)
        return pack_rows(np.ascontiguousarray(codes), scales, zero_points, layout.form)


def common_layout(tensors: Sequence[Tensor]) -> GridLayout | None:
    """The layout in which all can be stacked and kept; None where there is none."""
    layouts = [tensor.layout() if isinstance(tensor, GridTensor) else None for tensor in tensors]
    first = layouts[0]
    return first if first is not None and all(first.equals(other) for other in layouts) else None


class Parts:
    """The tensors that store one quantized matrix, checked as they are taken.

    Args:
        base: what their names begin with, without the dot.
        stored: every tensor of the checkpoint.
    """

    def __init__(self, base: str, stored: Mapping[str, StoredTensor]) -> None:
        self._base = base
        self._stored = stored
        self.names: list[str] = []
        """Of the tensors that were taken."""

    def take(self, part: str, dtypes: Collection[str], num_dims: int = 2) -> StoredTensor:
        """A tensor that must be there.

        Raises:
            CheckpointError: it is missing, of another type or another number of dimensions.
        """
        tensor = self.find(part, dtypes, num_dims)
        if tensor is None:
            raise self.error("has no " + part)
        return tensor

    def find(self, part: str, dtypes: Collection[str], num_dims: int = 2) -> StoredTensor | None:
        """A tensor that may be there.

        Raises:
            CheckpointError: it is of another type or another number of dimensions.
        """
        name = f"{self._base}.{part}"
        tensor = self._stored.get(name)
        if tensor is None:
            return None
        if tensor.info.dtype not in dtypes or len(tensor.info.shape) != num_dims:
            what = f"{tensor.info.dtype} {shown(list(tensor.info.shape))}"
            raise self.error(f"has a {part} of {what}, not {' or '.join(sorted(dtypes))} with {num_dims} dimensions")
        self.names.append(name)
        return tensor

    def check(self, fits: bool, what: str) -> None:
        """Refuse parts that do not fit together.

        Raises:
            CheckpointError: they do not.
        """
        if not fits:
            raise self.error(what)

    def error(self, what: str) -> CheckpointError:
        """An error about this matrix."""
        return CheckpointError(f"quantized matrix {shown(self._base)} {what}", hint=DAMAGED)


def check_bits(parts: Parts, bits: float) -> int:
    """``bits`` as a number of bits that kernels know.

    Raises:
        CheckpointError: they know no such integers.
    """
    parts.check(bits in (4, 8), f"has {bits:g} bits to a weight: only 4 and 8 are supported")
    return int(bits)


def column_groups(
    parts: Parts, name: str, columns: int, num_groups: int, *, in_order: bool = True
) -> NDArray[np.int64]:
    """Group of each column: as the tensor ``name`` says, or in order where there is none.

    Args:
        parts: of the matrix.
        name: of the tensor, behind the matrix's.
        columns: of the matrix.
        num_groups: of the matrix.
        in_order: whether the checkpoint may leave the tensor out; if columns are in another order, only it knows which.

    Raises:
        CheckpointError: not every column has a group, or not every group a column.
    """
    stored = parts.find(name, ["I32"], 1)
    if stored is None:
        parts.check(in_order or num_groups == 1, f"has no {name}, but columns in order of their inputs")
        parts.check(columns % num_groups == 0, f"has {num_groups} groups for {columns} columns")
        return np.arange(columns) // (columns // num_groups)
    parts.check(stored.info.shape == (columns,), f"has a {name} for {stored.info.shape[0]} of {columns} columns")
    groups = whole_vector(stored, "<i4")
    fits = groups.min() >= 0 and groups.max() == num_groups - 1
    parts.check(bool(fits), f"has a {name} that does not number its {num_groups} groups")
    return groups


def row_words(tensor: StoredTensor, start: int, stop: int) -> NDArray[np.uint32]:
    """Rows [start, stop) of a matrix of 32-bit words [rows, columns]."""
    raw = tensor.file.read(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
    return raw.view("<u4").reshape(stop - start, -1)


def column_words(tensor: StoredTensor, start: int, stop: int) -> NDArray[np.uint32]:
    """Columns [start, stop) of a matrix of 32-bit words [rows, columns]."""
    return column_bytes(tensor, start, stop).view("<u4")


def column_floats(tensor: StoredTensor, start: int, stop: int) -> NDArray[np.float32]:
    """Columns [start, stop) of a matrix of floats, transposed: [stop - start, rows]."""
    raw = column_bytes(tensor, start, stop)
    return np.ascontiguousarray(tensor.decode(raw).reshape(len(raw), stop - start).T)


def column_bytes(tensor: StoredTensor, start: int, stop: int) -> NDArray[np.uint8]:
    """The bytes of columns [start, stop), row by row: only those are read."""
    rows, columns = tensor.info.shape
    size = tensor.row_bytes // columns
    if (start, stop) == (0, columns):
        return tensor.file.read(tensor.offset, rows * tensor.row_bytes).reshape(rows, -1)
    first = tensor.offset + start * size
    width = (stop - start) * size
    return np.stack([tensor.file.read(first + row * tensor.row_bytes, width) for row in range(rows)])


def unpack(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Integers [..., n, per word] of words [..., n], the lowest bits first."""
    shifts = np.arange(0, WORD_BITS, bits, dtype=np.uint32)
    return ((words[..., None] >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8)


def whole_vector(tensor: StoredTensor, dtype: str) -> NDArray[np.int64]:
    """A vector of integers."""
    raw = tensor.file.read(tensor.offset, tensor.info.shape[0] * tensor.row_bytes)
    return raw.view(dtype).astype(np.int64)
