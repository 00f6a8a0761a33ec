"""Weights on their way from a checkpoint into the bundle's data file, a chunk of rows at a time.

:class:`DataFile` is the external data file of the graph; :class:`Weights` reads tensors from the checkpoint,
quantizes them by the recipe and hands out initializers. No tensor is ever whole in memory as float32: a chunk holds at
most :data:`CHUNK_ELEMENTS` values, so the peak does not grow with the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.bundle import WEIGHTS
from edge.errors import ExportError
from export.checkpoint import Checkpoint
from export.prequantized.grid import GridLayout, GridTensor, common_layout
from export.quantize.blockwise import QuantizedRows, dequantize_rows, quantize_rows, quantize_split, split_forms
from export.quantize.recipes import Blockwise, Float32, Format, Recipe

CHUNK_ELEMENTS = 4 << 20
"""Float32 values of one chunk: 16 MiB, some five times that while it is quantized."""
_CORRECTION = Blockwise(bits=4, block=32, symmetric=True)
"""Of 32 columns: the format whose products have the same bits in any number of rows."""
_ALIGN = 4096
"""Tensors start on a page, so that onnxruntime can map them."""
Chunks = Iterable[NDArray[np.float32]]
"""A matrix, some rows at a time."""
Rounding = Callable[[Chunks, Blockwise], Iterable[QuantizedRows]]
"""Quantizes a matrix chunk by chunk."""
Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Turns what a checkpoint stores into what a kernel wants, element by element."""
_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int64": ir.DataType.INT64,
    "uint8": ir.DataType.UINT8,
}


def to_nearest(chunks: Chunks, form: Blockwise) -> Iterable[QuantizedRows]:
    """Round every weight by itself."""
    return (quantize_rows(chunk, form) for chunk in chunks)


class DataFile:
    """The external data file: tensors follow each other, and each is written once."""

    def __init__(self, folder: Path, name: str = WEIGHTS) -> None:
        self._folder = folder
        self._name = name
        self._file = (folder / name).open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def begin(self) -> int:
        """Pad to the next tensor's start; returns its offset in bytes."""
        self._file.write(bytes(-self._file.tell() % _ALIGN))
        return self._file.tell()

    def flush(self) -> None:
        """Let other readers of the file see what was written."""
        self._file.flush()

    def append(self, array: NDArray[np.generic]) -> None:
        """Write an array's bytes at the end."""
        self._file.write(np.ascontiguousarray(array).data)

    def reserve(self, size: int) -> int:
        """Room of ``size`` bytes for one tensor, which :meth:`put` fills; returns its offset."""
        offset = self.begin()
        self._file.seek(offset + size)
        self._file.truncate()
        return offset

    def put(self, offset: int, array: NDArray[np.generic]) -> int:
        """Write an array's bytes into reserved room; returns the offset behind them."""
        self._file.seek(offset)
        self.append(array)
        self._file.seek(0, os.SEEK_END)
        return offset + array.nbytes

    def initializer(self, name: str, dtype: ir.DataType, shape: Sequence[int], offset: int) -> ir.Value:
        """An initializer over bytes of this file; two may share the same bytes."""
        length = int(np.prod(shape)) * dtype.itemsize
        tensor = ir.ExternalTensor(
            self._name, int(offset), int(length), dtype, shape=ir.Shape(shape), name=name, base_dir=self._folder
        )
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)

    def add(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """Write a small array whole and return its initializer."""
        offset = self.begin()
        self.append(array)
        return self.initializer(name, _DTYPES[array.dtype.name], array.shape, offset)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix in the data file, ready for the nodes that use it."""

    rows: int
    """Out features."""
    columns: int
    """In features."""
    form: Format
    """Its format; block size fitted to the columns."""
    parts: tuple[ir.Value, ...]
    """One initializer (float32: [rows, columns]); codes and scales, and zero points where the format has them."""
    num_bytes: int
    """In the data file."""
    order: NDArray[np.int64] | None = None
    """Input feature at each column; None = in order."""


@dataclass(frozen=True)
class Split:
    """A matrix whose codes are stored apart, their upper 4 bits and the rest: ``upper + lower / lower_codes``.

    The upper bits are a coarse copy, to be multiplied with; the lower ones are for rows that are looked up.
    """

    upper: Matrix
    lower: Matrix
    correction: Matrix | None
    """What the upper bits lack in a few of the columns, to be multiplied with too; None where nothing is multiplied."""
    lower_codes: int
    """So many steps of the lower bits are one of the upper."""

    @property
    def rows(self) -> int:
        """Out features."""
        return self.upper.rows

    @property
    def coarse_bytes(self) -> int:
        """Of what is multiplied with."""
        assert self.correction is not None
        return self.upper.num_bytes + self.correction.num_bytes

    @property
    def row_bytes(self) -> int:
        """Of a row that is looked up."""
        return (self.upper.num_bytes + self.lower.num_bytes) // self.rows


class _Writer:
    """A quantized matrix on its way into the data file, some rows at a time; others may be written meanwhile."""

    def __init__(
        self, file: DataFile, name: str, shape: tuple[int, int], form: Blockwise, *, half_scales: bool
    ) -> None:
        self._file, self._name, self._shape, self._form = file, name, shape, form
        self._half_scales = half_scales
        self._offset = self._next = file.reserve(self._size())
        self._scales: list[NDArray[np.float32]] = []
        self._zero_points: list[NDArray[np.uint8]] = []

    def add(self, chunk: QuantizedRows) -> None:
        """Write the rows that come next."""
        self._next = self._file.put(self._next, chunk.codes)
        self._scales.append(chunk.scales)
        if chunk.zero_points is not None:
            self._zero_points.append(chunk.zero_points)

    def finish(self, scales: tuple[ir.Value, ...] = ()) -> Matrix:
        """The matrix, once all rows are there; with ``scales`` of another one, where it shares them."""
        codes = self._file.initializer(f"{self._name}.codes", ir.DataType.UINT8, self._codes_shape(), self._offset)
        own = [] if scales else [self._file.add(f"{self._name}.scales", self._stored_scales())]
        if self._zero_points:
            own.append(self._file.add(f"{self._name}.zero_points", np.concatenate(self._zero_points)))
        num_bytes = self._size() + sum(part.const_value.nbytes for part in own if part.const_value is not None)
        return Matrix(*self._shape, self._form, (codes, *scales, *own), num_bytes)

    def _stored_scales(self) -> NDArray[np.float16] | NDArray[np.float32]:
        """In float16, where that changes none: a checkpoint's own may have more digits."""
        scales = np.concatenate(self._scales)
        with np.errstate(over="ignore"):
            halves = scales.astype(np.float16)
        return halves if self._half_scales and np.array_equal(halves, scales) else scales

    def _codes_shape(self) -> list[int]:
        rows, columns = self._shape
        return [rows, -(-columns // self._form.block), self._form.block * self._form.bits // 8]

    def _size(self) -> int:
        return math.prod(self._codes_shape())


class _DequantizedWriter(_Writer):
    """Writes the values that the codes stand for."""

    def add(self, chunk: QuantizedRows) -> None:
        """Write the rows that come next."""
        self._next = self._file.put(self._next, dequantize_rows(chunk, self._form, self._shape[1]))

    def finish(self, scales: tuple[ir.Value, ...] = ()) -> Matrix:
        """The matrix, once all rows are there."""
        del scales
        value = self._file.initializer(self._name, ir.DataType.FLOAT, self._shape, self._offset)
        return Matrix(*self._shape, Float32(), (value,), self._size())

    def _size(self) -> int:
        return math.prod(self._shape) * 4


class Weights:
    """Takes tensors from a checkpoint into a data file.

    Args:
        checkpoint: where tensors come from.
        recipe: how they are stored.
        file: where they go.
        progress: called with the number of parameters handled since the last call.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, file: DataFile, progress: Callable[[int], None]) -> None:
        self.recipe = recipe
        self.file = file
        self.parameter_count = 0
        """Parameters written so far; a tensor that is written twice counts once."""
        self.kept: dict[str, Blockwise] = {}
        """Formats of the matrices that were kept as the checkpoint stores them, by name."""
        self.requantized: list[str] = []
        """Matrices that are integers in the checkpoint, but of a kind that could not be kept."""
        self._counted: set[str] = set()
        self._checkpoint = checkpoint
        self._progress = progress

    def shape(self, source: str) -> tuple[int, ...]:
        """Of a tensor of the checkpoint."""
        return self._checkpoint.tensors[source].shape

    def values(self, source: str) -> NDArray[np.float32]:
        """A small tensor of the checkpoint, to choose by."""
        return self._checkpoint.rows(source)

    def vector(self, name: str, sources: Sequence[str], change: Change | None = None) -> ir.Value:
        """One float32 initializer out of one or more small tensors, end to end, after ``change``."""
        values = np.concatenate([self._read(source, 0, None) for source in sources])
        value = self.file.add(name, values if change is None else change(values))
        self._counted.update(sources)
        return value

    def matrix(self, name: str, sources: Sequence[str], form: Format, rounding: Rounding = to_nearest) -> Matrix:
        """One matrix out of one or more 2-D tensors of the same width, stacked by rows."""
        if isinstance(form, Blockwise):
            form = form.fit(self.shape(sources[0])[1])
        if isinstance(form, Float32):
            matrix = self._float_matrix(name, sources)
        else:
            rows = rounding(self._chunks(sources), form)
            matrix = self._write(name, self._stacked_shape(sources), form, rows)
        self._counted.update(sources)
        return matrix

    def split(self, name: str, source: str, form: Blockwise, corrected: NDArray[np.int64] | None) -> Split:
        """A tensor, rounded to nearest and taken apart; for a head with a correction for the columns ``corrected``."""
        shape = self._stacked_shape([source])
        form = form.fit(shape[1])
        copy, rest = split_forms(form)
        upper = self._writer(f"{name}.upper", shape, copy)
        lower = self._writer(f"{name}.lower", shape, rest)
        correction = None
        if corrected is not None:
            correction = self._writer(f"{name}.correction", (shape[0], len(corrected)), _CORRECTION)
        for chunk in self._chunks([source]):
            coarse, fine = quantize_split(chunk, form)
            upper.add(coarse)
            lower.add(fine)
            if correction is not None:
                lacking = chunk - dequantize_rows(coarse, copy, shape[1])
                correction.add(quantize_rows(lacking[:, corrected], _CORRECTION))
        self._counted.add(source)
        first = upper.finish()
        second = lower.finish(scales=first.parts[1:2])
        third = replace(correction.finish(), order=corrected) if correction is not None else None
        return Split(first, second, third, 2**rest.bits)

    def round_again(self, matrix: Matrix, source: str, rounding: Rounding) -> None:
        """Give a matrix of one tensor other codes, scales and zero points, in its place in the data file."""
        assert isinstance(matrix.form, Blockwise)
        tensors = [part.const_value for part in matrix.parts if isinstance(part.const_value, ir.ExternalTensor)]
        offsets = [tensor.offset or 0 for tensor in tensors]
        for rows in rounding(self._chunks([source]), matrix.form):
            arrays: list[NDArray[Any]] = [rows.codes, rows.scales]
            arrays += [] if rows.zero_points is None else [rows.zero_points]
            places = zip(offsets, arrays, tensors, strict=True)
            offsets = [self.file.put(at, array.astype(tensor.dtype.numpy())) for at, array, tensor in places]

    def stored_matrix(self, name: str, sources: Sequence[str]) -> Matrix | None:
        """The matrix with the integers that the checkpoint has; None where it has none, or none that kernels take."""
        tensors = [self._checkpoint.stored(source) for source in sources]
        grids = [tensor for tensor in tensors if isinstance(tensor, GridTensor)]
        layout = common_layout(tensors)
        if layout is None:
            self.requantized += [name] if grids else []
            return None
        self.kept[name] = layout.form
        if self.recipe.dequantize:
            return self.matrix(name, sources, Float32())
        chunks = (self._packed(*place, layout) for place in self._places(sources))
        matrix = self._write(name, self._stacked_shape(sources), layout.form, chunks, layout.order)
        self._counted.update(sources)
        return matrix

    def _packed(self, source: str, start: int, stop: int, layout: GridLayout) -> QuantizedRows:
        tensor = self._checkpoint.stored(source)
        assert isinstance(tensor, GridTensor)
        rows = tensor.packed(start, stop, layout)
        self._check(source, start, rows.scales, (stop - start) * tensor.info.shape[1])
        return rows

    def _float_matrix(self, name: str, sources: Sequence[str]) -> Matrix:
        rows, columns = self._stacked_shape(sources)
        offset = self.file.begin()
        for chunk in self._chunks(sources):
            self.file.append(chunk)
        value = self.file.initializer(name, ir.DataType.FLOAT, [rows, columns], offset)
        return Matrix(rows, columns, Float32(), (value,), rows * columns * 4)

    def _write(
        self,
        name: str,
        shape: tuple[int, int],
        form: Blockwise,
        chunks: Iterable[QuantizedRows],
        order: NDArray[np.int64] | None = None,
    ) -> Matrix:
        writer = self._writer(name, shape, form)
        for chunk in chunks:
            writer.add(chunk)
        return replace(writer.finish(), order=order)

    def _writer(self, name: str, shape: tuple[int, int], form: Blockwise) -> _Writer:
        kind = _DequantizedWriter if self.recipe.dequantize else _Writer
        return kind(self.file, name, shape, form, half_scales=self.recipe.scales == "float16")

    def _stacked_shape(self, sources: Sequence[str]) -> tuple[int, int]:
        shapes = [self.shape(source) for source in sources]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    def _chunks(self, sources: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Row chunks of the stacked sources."""
        for source, start, stop in self._places(sources):
            yield self._read(source, start, stop)

    def _places(self, sources: Sequence[str]) -> Iterator[tuple[str, int, int]]:
        """Source, first row and row after the last of each chunk."""
        for source in sources:
            rows, columns = self._checkpoint.tensors[source].shape
            step = max(1, CHUNK_ELEMENTS // columns)
            for start in range(0, rows, step):
                yield source, start, min(start + step, rows)

    def _read(self, source: str, start: int, stop: int | None) -> NDArray[np.float32]:
        rows = self._checkpoint.rows(source, start, stop)
        self._check(source, start, rows, rows.size)
        return rows

    def _check(self, source: str, start: int, values: NDArray[np.float32], size: int) -> None:
        """Refuse numbers that would poison a whole block, and count ``size`` parameters."""
        if not np.isfinite(values).all():
            hint = "the checkpoint is damaged: download it again"
            raise ExportError(f"{source} holds NaN or infinity at row {start} or after", hint=hint)
        if source not in self._counted:
            self.parameter_count += size
            self._progress(size)
