"""What this machine can do, measured in two seconds: how fast its kernels read weights, and how fast they compute.

A model of a few large products is made, as the export would, and run by the engine's own session: what is measured is
what a decode step and a prompt do. No two of its matrices are equal, since onnxruntime would keep only one of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edge.bundle import GRAPH, WEIGHTS
from edge.engine.engine import physical_cores
from edge.engine.session import Session
from edge.planning.machine import Machine
from edge.planning.shape import Format, Product

_FORM = Format(4, 128)
_WIDE, _NARROW, _PAIRS = 8192, 2048, 4
PRODUCTS = (Product(_WIDE, _NARROW, _FORM, _PAIRS), Product(_NARROW, _WIDE, _FORM, _PAIRS))
"""8 products of 9 MB: larger together than a processor's caches, each as large as in a model of a billion weights."""
_DECODE_ROWS, _FEW_ROWS, _MANY_ROWS = 2, 16, 128
_MOST_SECONDS = 1.5
_ATTENTION_SHARE = 0.05
"""Attention over one token, floating-point operations to those of products: as on the machine of docs/planning.md."""
_PYTHON_S = 2.1e-3
"""What :func:`_work_in_python` takes on that machine."""
_CODES_BYTES = _WIDE * _NARROW // 2
_UINT8, _FLOAT = 2, 1
_EXTERNAL = 1


def measure(title: str, features: tuple[str, ...], memory_bytes: int, *, seconds: float = 0.7) -> Machine:
    """Measure this machine.

    Args:
        title: its name.
        features: of its processor.
        memory_bytes: that the service may take.
        seconds: for each of two figures.
    """
    threads = physical_cores()
    with TemporaryDirectory(prefix="qwedge-plan-") as folder:
        write_model(Path(folder))
        session = Session(Path(folder), threads=threads, spin_us=1000)
        decode_s = _fastest(_Chain(session, _DECODE_ROWS).run, seconds)
        rows = _FEW_ROWS
        compute_s = _fastest(_Chain(session, rows).run, seconds / 3)
        if compute_s * _MANY_ROWS / _FEW_ROWS < _MOST_SECONDS:
            rows = _MANY_ROWS
            compute_s = _fastest(_Chain(session, rows).run, seconds)
    gops = 2 * sum(product.num_weights for product in PRODUCTS) * rows / compute_s / 1e9
    return Machine(
        title=title,
        cores=threads,
        features=features,
        read_gbs=sum(product.num_bytes for product in PRODUCTS) / decode_s / 1e9,
        read_source="measured now",
        gops=gops,
        attention_gflops=_ATTENTION_SHARE * gops,
        dequantize_ns=3.2 / threads,
        speed=_PYTHON_S / _fastest(_work_in_python, 0.1),
        storage_mbs=1e5,
        memory_bytes=memory_bytes,
        power_w=None,
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


class _Chain:
    """The products, one after the other, with so many rows."""

    def __init__(self, session: Session, rows: int) -> None:
        # A step is bound to its arrays by their addresses: they live as long as it.
        self._x = np.ones((rows, _NARROW), np.float32)
        self._y = np.zeros_like(self._x)
        self._step = session.step({"x0": self._x}, {f"x{2 * _PAIRS}": self._y}, [])

    def run(self) -> None:
        self._step.run()


def _work_in_python() -> int:
    total = 0
    for i in range(50_000):
        total ^= i * 3
    return total


def write_model(folder: Path) -> None:
    """The chain of products: random codes, and scales of zero."""
    offset = 0
    nodes, initializers = [], []
    for i in range(2 * _PAIRS):
        rows, columns = (_NARROW, _WIDE) if i % 2 else (_WIDE, _NARROW)
        blocks = columns // _FORM.block
        for part, kind, shape, item in (
            ("codes", _UINT8, (rows, blocks, _FORM.block // 2), 1),
            ("scales", _FLOAT, (rows, blocks), 4),
        ):
            size = int(np.prod(shape)) * item
            initializers.append(_external(f"{part}{i}", kind, shape, offset, size))
            offset += -(-size // 4096) * 4096
        nodes.append(_node(i, rows, columns))
    values = [_value(11, "x0"), _value(12, f"x{2 * _PAIRS}")]
    graph = b"".join(
        [
            *(_field(1, node) for node in nodes),
            _field(2, b"probe"),
            *(_field(5, each) for each in initializers),
            *values,
        ]
    )
    opsets = [_field(8, _field(1, b"") + _number(2, 23)), _field(8, _field(1, b"com.microsoft") + _number(2, 1))]
    (folder / GRAPH).write_bytes(b"".join([_number(1, 10), _field(7, graph), *opsets]))
    codes = os.urandom(_CODES_BYTES)
    with (folder / WEIGHTS).open("wb") as file:
        for i in range(2 * _PAIRS):
            file.seek(i * offset // (2 * _PAIRS))
            file.write(codes[i:] + codes[:i])
        file.truncate(offset)


def _node(i: int, rows: int, columns: int) -> bytes:
    """A MatMulNBits from ``x{i}`` to ``x{i + 1}``."""
    numbers = {"N": rows, "K": columns, "bits": int(_FORM.bits), "block_size": _FORM.block, "accuracy_level": 4}
    attributes = [
        _field(5, _field(1, name.encode()) + _number(3, value) + _number(20, 2)) for name, value in numbers.items()
    ]
    inputs = [_field(1, name.encode()) for name in (f"x{i}", f"codes{i}", f"scales{i}")]
    return b"".join(
        [*inputs, _field(2, f"x{i + 1}".encode()), _field(4, b"MatMulNBits"), *attributes, _field(7, b"com.microsoft")]
    )


def _external(name: str, kind: int, shape: tuple[int, ...], offset: int, size: int) -> bytes:
    places = {"location": WEIGHTS, "offset": str(offset), "length": str(size)}
    dims = b"".join(_number(1, size) for size in shape)
    entries = b"".join(_field(13, _field(1, key.encode()) + _field(2, value.encode())) for key, value in places.items())
    return dims + _number(2, kind) + _field(8, name.encode()) + entries + _number(14, _EXTERNAL)


def _value(number: int, name: str) -> bytes:
    """An input or output of the graph [rows, 2048] float32."""
    dims = _field(1, _field(2, b"rows")) + _field(1, _number(1, _NARROW))
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
