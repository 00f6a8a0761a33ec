"""A graph for a GPU, out of the float32 graph that every export builds and verifies on a processor (docs/gpu.md).

Attention takes the norms of query and key heads itself, which only GPUs' kernels do. For CUDA, whose attention knows no
float32, activations, cache, scales and norms become float16; ids stay as they are, and logits and hidden states come
out as float32. Integers of the weights are the same bytes for every target.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edge.bundle import GRAPH, WEIGHTS, KVLayout, Target
from edge.errors import ConfigError, ExportError
from export.quantize.recipes import COARSE_BITS, Blockwise, Recipe
from export.segments import Layer, embed, num_layers, refusals
from export.weights import CHUNK_ELEMENTS, DataFile

LARGEST_ACTIVATION: Final = 16384.0
"""What may go from layer to layer in float16: a quarter of its largest number."""
_QUERY_NORM, _KEY_NORM = 14, 15
"""Inputs of GroupQueryAttention."""
_CHAIN = ("Reshape", "RMSNormalization", "Reshape")
"""From the queries or keys that attention takes up to those that a product made."""


@dataclass(frozen=True)
class Form:
    """What a target wants of a graph."""

    half: bool
    """Compute in float16."""


FORMS: Final[dict[Target, Form]] = {
    "cuda": Form(half=True),
    # float16 is an extra of WebGPU's that small GPUs, and those played by a processor, do not have.
    "webgpu": Form(half=False),
}


def check_target(target: Target, *, kv: str, adapters: bool, states: bool) -> None:
    """Refuse what no graph for a GPU has.

    Raises:
        ConfigError: int8 cache, adapters or linear attention are wanted.
    """
    reasons = {"an int8 cache": kv == "int8", "adapters": adapters, "linear attention": states}
    for reason, wanted in reasons.items():
        if target != "cpu" and wanted:
            hint = "export it with --target cpu"
            raise ConfigError(f"--target {target} does not go with {reason}", hint=hint, param="target")


def recipe_for(target: Target, recipe: Recipe) -> Recipe:
    """The recipe with formats that the target's kernels take: GPUs look up rows of 4 and of 8 bits only."""
    if target == "cpu" or not isinstance(recipe.table, Blockwise) or recipe.table.bits == COARSE_BITS:
        return recipe
    return replace(recipe, table=replace(recipe.table, bits=8))


def retarget(model: ir.Model, folder: Path, target: Target, layout: KVLayout) -> KVLayout:
    """Turn a finished graph for processors, and its data file beside it, into one for a GPU.

    Args:
        model: the graph; changed in place.
        folder: where both files are; they are written anew.
        target: cuda or webgpu.
        layout: of the graph's cache.

    Returns:
        That of the new graph's.

    Raises:
        ExportError: a weight is beyond float16, or onnxruntime refuses the new graph.
        OSError: the disk refused.
    """
    fuse_head_norms(model)
    if target == "webgpu":
        unpack_zero_points(model)
    RemoveUnusedNodesPass()(model)
    if FORMS[target].half:
        to_half(model, folder)
        layout = layout.model_copy(update={"dtype": "float16"})
    ir.save(model, folder / GRAPH)
    _check_loads(folder / GRAPH)
    return layout


def check_range(model: ir.Model, folder: Path, target: Target, ids: Sequence[int]) -> dict[str, Any]:
    """Whether what goes from layer to layer fits into the target's numbers, for some tokens.

    Returns:
        What the manifest tells of it.

    Raises:
        ExportError: it does not.
    """
    if not FORMS[target].half:
        return {}
    x, largest = embed(model, folder, ids), 0.0
    for index in range(num_layers(model)):
        x = Layer(model, folder, index).append(x)
        largest = max(largest, float(np.abs(x).max()))
    if largest > LARGEST_ACTIVATION:
        hint = "export it with --target webgpu or cpu, which compute in float32"
        raise ExportError(f"activations reach {largest:.0f}, which leaves float16 no room", hint=hint)
    return {"largest_activation": largest}


def fuse_head_norms(model: ir.Model) -> None:
    """Let attention normalize the heads of queries and keys, where norms stand before it; they stay, without use."""
    for node in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        query, key = (_norm_before(node.inputs[place]) for place in (0, 1))
        if query is None or key is None:
            continue
        node.resize_inputs(_KEY_NORM + 1)
        for place, chain in ((0, query), (1, key)):
            node.replace_input_with(place, chain[-1].inputs[0])
            node.replace_input_with(_QUERY_NORM + place, chain[1].inputs[1])
        epsilon = query[1].attributes["epsilon"].as_float()
        node.attributes.add(ir.AttrFloat32("qk_norm_epsilon", epsilon))


def unpack_zero_points(model: ir.Model) -> None:
    """Let tables with an odd number of 4-bit blocks in a row be looked up by WebGPU.

    Rows of zero points are filled up to whole bytes, where they are uint8. WebGPU's kernel does not know that; as uint4
    they follow each other. Matrices that are multiplied with are read as they should be.
    """
    for node in model.graph:
        if node.op_type != "GatherBlockQuantized" or node.attributes["bits"].as_int() != 4 or len(node.inputs) < 4:
            continue
        codes, scales, zero_points = node.inputs[0], node.inputs[2], node.inputs[3]
        blocks = _stored(scales).shape.numpy()[1]
        if zero_points is None or blocks % 2 == 0:
            continue
        table = _stored(codes)
        assert isinstance(table, ir.ExternalTensor)
        rows, row_bytes = table.shape.numpy()
        shape = ir.Shape([rows, 2 * row_bytes])
        four = ir.ExternalTensor(
            WEIGHTS, table.offset, table.length, ir.DataType.UINT4, shape=shape, name=f"{table.name}.uint4",
            base_dir=table.base_dir,
        )  # fmt: skip
        packed = _stored(zero_points).numpy()
        each = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)[:, :blocks]
        node.replace_input_with(0, _register(model.graph, four))
        name = f"{zero_points.name}.uint4"
        node.replace_input_with(3, _register(model.graph, ir.tensor(each.astype(ir.DataType.UINT4.numpy()), name=name)))


def to_half(model: ir.Model, folder: Path) -> None:
    """Turn all float32 values into float16, but for those that come out; the data file is written anew."""
    graph = model.graph
    with tempfile.TemporaryDirectory(prefix=".half.", dir=folder.parent) as name:
        new = Path(name)
        _write_half(list(graph.initializers.values()), folder, new)
        (new / WEIGHTS).replace(folder / WEIGHTS)
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _at(value.const_value, folder)
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in [node for node in graph if node.op_type == "Cast"]:
        stored = node.inputs[0]
        assert stored is not None
        if stored.dtype == ir.DataType.FLOAT16:  # scales
            ir.convenience.replace_all_uses_with(node.outputs[0], stored)
            graph.remove(node, safe=True)
        elif node.attributes["to"].as_int() == ir.DataType.FLOAT:  # rotary tables
            node.attributes.add(ir.AttrInt64("to", ir.DataType.FLOAT16))
    for index, value in enumerate(graph.outputs):
        if not str(value.name).startswith("present"):
            graph.outputs[index] = _cast(graph, value)


def _norm_before(value: ir.Value | None) -> list[ir.Node] | None:
    """The nodes that normalize heads, the last one first; None where other nodes make ``value``."""
    nodes = []
    for op_type in _CHAIN:
        node = value.producer() if value is not None else None
        if node is None or node.op_type != op_type:
            return None
        nodes.append(node)
        value = node.inputs[0]
    return nodes


def _stored(value: ir.Value | None) -> ir.TensorProtocol:
    """What the data file holds of an input, before a node that converts it."""
    assert value is not None
    node = value.producer()
    value = value if node is None else node.inputs[0]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    name = str(tensor.name)
    known = graph.initializers.get(name)
    if known is None:
        shape = ir.Shape(tensor.shape.numpy())
        known = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(known)
    return known


def _cast(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The output of ``value``'s name, as float32."""
    name = str(value.name)
    value.name = f"{name}.half"
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"Cast_{name}")
    graph.append(node)
    result = node.outputs[0]
    result.name, result.shape, result.type = name, value.shape, ir.TensorType(ir.DataType.FLOAT)
    return result


def _write_half(values: Sequence[ir.Value], source: Path, folder: Path) -> None:
    """Write all initializers' bytes into a new data file, and let them point there."""
    places: dict[tuple[int, int], int] = {}
    with DataFile(folder) as file:
        for value in sorted(values, key=_offset):
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
                    value.const_value = ir.tensor(_half(tensor.numpy(), str(value.name)), name=value.name)
                    value.type = ir.TensorType(ir.DataType.FLOAT16)
                continue
            is_float = tensor.dtype == ir.DataType.FLOAT
            place = (_offset(value), tensor.nbytes)  # two may share the same bytes
            if place not in places:
                places[place] = _copy(tensor, source, file, str(value.name))
            dtype = ir.DataType.FLOAT16 if is_float else tensor.dtype
            assert value.shape is not None
            moved = file.initializer(str(value.name), dtype, value.shape.numpy(), places[place])
            value.const_value, value.type = moved.const_value, moved.type


def _copy(tensor: ir.ExternalTensor, source: Path, file: DataFile, name: str) -> int:
    """Append a tensor's bytes, floats as float16; returns where."""
    is_float = tensor.dtype == ir.DataType.FLOAT
    old = np.memmap(
        source / WEIGHTS,
        np.float32 if is_float else np.uint8,
        "r",
        tensor.offset or 0,
        tensor.nbytes // (4 if is_float else 1),
    )
    offset = file.begin()
    for start in range(0, len(old), CHUNK_ELEMENTS):
        chunk = old[start : start + CHUNK_ELEMENTS]
        file.append(_half(chunk, name) if is_float else chunk)
    return offset


def _half(values: NDArray[Any], name: str) -> NDArray[np.float16]:
    if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        hint = "export it with --target webgpu or cpu, which compute in float32"
        raise ExportError(f"{name} holds numbers beyond float16", hint=hint)
    return values.astype(np.float16)


def _offset(value: ir.Value) -> int:
    tensor = value.const_value
    return (tensor.offset or 0) if isinstance(tensor, ir.ExternalTensor) else -1


def _at(tensor: ir.ExternalTensor, folder: Path) -> ir.ExternalTensor:
    """The same tensor of a data file in another folder."""
    return ir.ExternalTensor(
        WEIGHTS, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name or "", base_dir=folder
    )


def _check_loads(graph: Path) -> None:
    """Let onnxruntime check operators, types and shapes; only a GPU can run the graph.

    Raises:
        ExportError: it refuses.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    with refusals():
        ort.InferenceSession(graph, options, ["CPUExecutionProvider"])
