"""What this machine can do, measured in three seconds: how fast its kernels read weights, and how fast they compute.

Products of the model's own sizes and formats are made, as the export would, and run by the engine's own session: what
is measured is what a decode step and a prompt do. No two of their matrices are equal, since onnxruntime would keep only
one of them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edge.bundle import GRAPH, WEIGHTS
from edge.engine.engine import physical_cores
from edge.engine.rows import row_multiple
from edge.engine.session import Session
from edge.planning.machine import Machine, has_int8_kernels
from edge.planning.shape import Product, Shape
from edge.planning.speed import operations

_SAMPLE_BYTES = 150 << 20
"""Of products: more than caches hold. On a Xeon with a large L3, 72 MiB are read twice as fast as a model."""
_FEW_ROWS, _MANY_ROWS = 16, 128
_MOST_SECONDS = 1.5
_ATTENTION_SHARE = 0.05
"""Attention over one token, floating-point operations to those of products: as on the machine of docs/planning.md."""
_PYTHON_S = 2.1e-3
"""What :func:`_work_in_python` takes on that machine."""
_UINT8, _FLOAT = 2, 1
_EXTERNAL = 1
_PAGE_BYTES = 4096


def measure(title: str, features: tuple[str, ...], memory_bytes: int, shape: Shape, *, seconds: float = 0.7) -> Machine:
    """Measure this machine, with products of a model.

    Its rates are those by which the formulas of :mod:`edge.planning.speed` give the times that were measured.

    Args:
        title: its name.
        features: of its processor.
        memory_bytes: that the service may take.
        shape: of the model.
        seconds: for each of two figures.
    """
    threads = physical_cores()
    int8 = has_int8_kernels(features)
    products = sample(shape, int8=int8)
    with TemporaryDirectory(prefix="qwedge-plan-") as folder:
        write_model(Path(folder), products)
        session = Session(Path(folder), threads=threads, spin_us=1000)
        decode_s = _fastest(_Step(session, products, row_multiple(shape.row_multiple)).run, seconds)
        rows = _FEW_ROWS
        compute_s = _fastest(_Step(session, products, rows).run, seconds / 3)
        if compute_s * _MANY_ROWS / _FEW_ROWS < _MOST_SECONDS:
            rows = _MANY_ROWS
            compute_s = _fastest(_Step(session, products, rows).run, seconds)
    gops = sum(operations(each, int8=int8) for each in products) * rows / compute_s / 1e9
    return Machine(
        title=title,
        cores=threads,
        features=features,
        read_gbs=sum(each.num_bytes for each in products) / decode_s / 1e9,
        read_source="measured now",
        gops=gops,
        attention_gflops=_ATTENTION_SHARE * gops,
        dequantize_ns=3.2 / threads,
        speed=_PYTHON_S / _fastest(_work_in_python, 0.1),
        storage_mbs=1e5,
        memory_bytes=memory_bytes,
        power_w=None,
    )


def sample(shape: Shape, *, int8: bool) -> tuple[Product, ...]:
    """The products of so many of a model's layers as no cache holds, or of all.

    Without int8 kernels 8-bit ones are made in 4 bits: it is what takes them apart (``Machine.dequantize_ns``).
    """
    layers = shape.num_layers
    one = sum(each.num_bytes for each in shape.layers) / layers
    some = min(layers, math.ceil(_SAMPLE_BYTES / one))
    products = (replace(each, count=math.ceil(each.count * some / layers)) for each in shape.layers)
    return tuple(
        each if int8 or each.form.bits != 8 else replace(each, form=replace(each.form, bits=4)) for each in products
    )


def _fastest(work: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest of several runs, where what others take from the machine counts least."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


class _Step:
    """All products, one after the other, with so many rows."""

    def __init__(self, session: Session, products: Sequence[Product], rows: int) -> None:
        # A step is bound to its arrays by their addresses: they live as long as it.
        self._inputs = {f"x{columns}": np.ones((rows, columns), np.float32) for columns in _widths(products)}
        self._outputs = {f"y{i}": np.zeros((rows, each.rows), np.float32) for i, each in enumerate(_matrices(products))}
        self._step = session.step(self._inputs, self._outputs, [])

    def run(self) -> None:
        self._step.run()


def _matrices(products: Sequence[Product]) -> list[Product]:
    """Each matrix by itself, in the order of layers."""
    most = max(each.count for each in products)
    return [replace(each, count=1) for i in range(most) for each in products if i < each.count]


def _widths(products: Sequence[Product]) -> list[int]:
    return sorted({each.columns for each in products})


def _work_in_python() -> int:
    total = 0
    for i in range(50_000):
        total ^= i * 3
    return total


def write_model(folder: Path, products: Sequence[Product]) -> None:
    """Products with matrices of random codes and of scales of zero, or of zeros where they are floats.

    Product i of all reads ``x{columns}`` and writes ``y{i}``.
    """
    graph, noise, offset = b"", os.urandom(1 << 20), 0
    with (folder / WEIGHTS).open("wb") as file:
        for i, each in enumerate(_matrices(products)):
            for name, kind, dims, size in _tensors(i, each):
                graph += _field(5, _external(name, kind, dims, offset, size))
                if kind == _UINT8:
                    file.seek(offset)
                    file.write(((noise[i:] + noise[:i]) * (size // len(noise) + 1))[:size])
                offset += -(-size // _PAGE_BYTES) * _PAGE_BYTES
            graph += _field(1, _node(i, each)) + _value(12, f"y{i}", each.rows)
        file.truncate(offset)
    graph += _field(2, b"probe") + b"".join(_value(11, f"x{columns}", columns) for columns in _widths(products))
    opsets = [_field(8, _field(1, b"") + _number(2, 23)), _field(8, _field(1, b"com.microsoft") + _number(2, 1))]
    (folder / GRAPH).write_bytes(b"".join([_number(1, 10), _field(7, graph), *opsets]))


def _tensors(i: int, product: Product) -> list[tuple[str, int, tuple[int, ...], int]]:
    """Name, type, shape and bytes of a matrix' parts."""
    form = product.form
    if form.is_float:
        return [(f"weights{i}", _FLOAT, (product.columns, product.rows), product.num_bytes)]
    blocks = -(-product.columns // form.block)
    block_bytes = int(form.block * form.bits) // 8
    return [
        (f"codes{i}", _UINT8, (product.rows, blocks, block_bytes), product.rows * blocks * block_bytes),
        (f"scales{i}", _FLOAT, (product.rows, blocks), product.rows * blocks * 4),
    ]


def _node(i: int, product: Product) -> bytes:
    """A product."""
    form = product.form
    inputs = [f"x{product.columns}", *(name for name, *_ in _tensors(i, product))]
    edges = [*(_field(1, name.encode()) for name in inputs), _field(2, f"y{i}".encode())]
    if form.is_float:
        return b"".join([*edges, _field(4, b"MatMul")])
    sizes = {"N": product.rows, "K": product.columns, "bits": int(form.bits), "block_size": form.block}
    attributes = [
        _field(5, _field(1, name.encode()) + _number(3, value) + _number(20, 2))
        for name, value in {**sizes, "accuracy_level": 4}.items()
    ]
    return b"".join([*edges, _field(4, b"MatMulNBits"), *attributes, _field(7, b"com.microsoft")])


def _external(name: str, kind: int, shape: tuple[int, ...], offset: int, size: int) -> bytes:
    places = {"location": WEIGHTS, "offset": str(offset), "length": str(size)}
    dims = b"".join(_number(1, size) for size in shape)
    entries = b"".join(_field(13, _field(1, key.encode()) + _field(2, value.encode())) for key, value in places.items())
    return dims + _number(2, kind) + _field(8, name.encode()) + entries + _number(14, _EXTERNAL)


def _value(number: int, name: str, width: int) -> bytes:
    """An input or output of the graph [rows, width] float32."""
    dims = _field(1, _field(2, b"rows")) + _field(1, _number(1, width))
    kind = _field(1, _number(1, _FLOAT) + _field(2, dims))
    return _field(number, _field(1, name.encode()) + _field(2, kind))


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes of a protobuf message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """A field that is a whole number."""
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    return bytes(_groups(value))


def _groups(value: int) -> Iterator[int]:
    while value >= 0x80:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
