"""The shape of a bundle: read from its graph, so that it holds for whatever recipe made it.

The graph is a protobuf message of some 100 kB. Only the few fields that are needed are read, by their numbers in
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; a device has no onnx package.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from edge.bundle import GRAPH, Manifest
from edge.errors import BundleError
from edge.planning.shape import FLOAT_BITS, Format, Product, Shape

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES: Final = {_FIXED64: 8, _FIXED32: 4}
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_TENSOR_DIMS, _TENSOR_NAME = 1, 8

Value = int | memoryview
"""Of a field: a number, or bytes."""
Sizes = dict[str, list[int]]
"""Shapes of the graph's constants by name."""


@dataclass(frozen=True)
class _Node:
    """One operator."""

    op_type: str
    inputs: tuple[str, ...]
    attributes: dict[str, int]
    """Those that are whole numbers."""


def read_shape(bundle: Path, manifest: Manifest) -> Shape:
    """What a bundle is made of.

    Raises:
        BundleError: its graph cannot be read, or is none of a language model.
    """
    path = bundle / GRAPH
    try:
        nodes, sizes = _parse(memoryview(path.read_bytes()))
        return _shape(nodes, sizes, manifest)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint="export or copy the bundle again") from None
    except (IndexError, KeyError, ValueError):
        raise BundleError(f"{path} is no graph of a language model", hint="export the bundle again") from None


def _shape(nodes: list[_Node], sizes: Sizes, manifest: Manifest) -> Shape:
    products = Counter(_product(node, sizes) for node in nodes if _multiplies(node, sizes))
    heads = sorted((each for each in products if each.rows == manifest.padded_vocab_size), key=_columns)
    layers = tuple(replace(product, count=count) for product, count in products.items() if product not in heads)
    head_table = manifest.recipe.get("head")
    return Shape(
        name=manifest.name,
        recipe=str(manifest.recipe.get("name", "?")),
        layers=layers,
        head=heads[-1],
        correction=heads[0] if len(heads) > 1 else None,
        table=_table(nodes, sizes, manifest.padded_vocab_size),
        candidates=int(head_table.get("candidates", 0)) if isinstance(head_table, dict) else 0,
        num_layers=manifest.kv.layers + (manifest.state.layers if manifest.state else 0),
        num_heads=max(node.attributes["num_heads"] for node in nodes if node.op_type == "GroupQueryAttention"),
        hidden_size=heads[-1].columns,
        vocab_size=manifest.vocab_size,
        context_length=manifest.context_length,
        kv=manifest.kv,
        state=manifest.state,
        converted_bytes=sum(4 * math.prod(size) for size in _converted(nodes, sizes)),
        disk_bytes=sum(entry.size for entry in manifest.files),
    )


def _converted(nodes: list[_Node], sizes: Sizes) -> list[list[int]]:
    """Shapes of the scales that are stored in another type."""
    found = [sizes.get(node.inputs[0], []) for node in nodes if node.op_type == "Cast"]
    return [size for size in found if len(size) == 2]


def _columns(product: Product) -> int:
    return product.columns


def _multiplies(node: _Node, sizes: Sizes) -> bool:
    """Whether it multiplies by weights, which the products of candidates and of adapters do not."""
    if node.op_type == "MatMulNBits":
        return True
    return node.op_type == "FusedMatMul" and len(sizes.get(node.inputs[1], ())) == 2


def _product(node: _Node, sizes: Sizes) -> Product:
    if node.op_type == "MatMulNBits":
        numbers = node.attributes
        return Product(numbers["N"], numbers["K"], Format(numbers["bits"], numbers["block_size"]))
    rows, columns = sizes[node.inputs[1]]
    return Product(rows, columns, Format(FLOAT_BITS))


def _table(nodes: list[_Node], sizes: Sizes, rows: int) -> Product:
    """The embedding; where its codes are taken apart, rows of both parts are looked up, with the same scales."""
    found = {node.inputs[0]: node for node in nodes if node.op_type in {"GatherBlockQuantized", "Gather"}}
    parts = [(sizes[name], node) for name, node in found.items() if len(sizes.get(name, ())) == 2]
    parts = [(shape, node) for shape, node in parts if shape[0] == rows]
    shape, node = parts[0]
    parts = [(shape, each) for shape, each in parts if each.inputs[2:3] == node.inputs[2:3]]
    if node.op_type == "Gather":
        return Product(rows, shape[1], Format(FLOAT_BITS))
    columns = shape[1] * 8 // node.attributes["bits"]
    bits = sum(each.attributes["bits"] for _, each in parts)
    return Product(rows, columns, Format(bits, node.attributes["block_size"]))


def _parse(model: memoryview) -> tuple[list[_Node], Sizes]:
    graph = next(value for number, value in _fields(model) if number == _MODEL_GRAPH)
    nodes, sizes = [], {}
    for number, value in _fields(_message(graph)):
        if number == _GRAPH_NODE:
            nodes.append(_node(_message(value)))
        elif number == _GRAPH_INITIALIZER:
            name, shape = _initializer(_message(value))
            sizes[name] = shape
    return nodes, sizes


def _node(message: memoryview) -> _Node:
    inputs, attributes, op_type = [], {}, ""
    for number, value in _fields(message):
        if number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_OP_TYPE:
            op_type = _text(value)
        elif number == _NODE_ATTRIBUTE:
            attribute = dict(_fields(_message(value)))
            whole = attribute.get(_ATTRIBUTE_INT)
            if isinstance(whole, int):
                attributes[_text(attribute[_ATTRIBUTE_NAME])] = whole
    return _Node(op_type, tuple(inputs), attributes)


def _initializer(message: memoryview) -> tuple[str, list[int]]:
    name, shape = "", []
    for number, value in _fields(message):
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else list(_varints(value))
    return name, shape


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Numbers and values of a message's fields, in their order."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        size = _FIXED_SIZES.get(kind)
        if size is None:
            if kind != _BYTES:
                raise ValueError(f"field {number} is of an unknown kind")
            size, at = _varint(message, at)
        if at + size > len(message):
            raise ValueError("a field is longer than its message")
        yield number, message[at : at + size]
        at += size


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number that begins there, and where the next field does."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where there should be a message")  # noqa: TRY004 - the data is wrong, not the call
    return value


def _text(value: Value) -> str:
    return bytes(_message(value)).decode()
