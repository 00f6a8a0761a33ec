"""A finished graph, run a piece at a time over its data file, so that even a 7B runs in a few hundred megabytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edge.errors import ExportError
from export.graph import COARSE_LOGITS, FINAL_HIDDEN, HIDDEN, HIDDEN_STATES, present_name

DEFECT = "this is a defect of qwedge or of onnxruntime: please report it"
Array = NDArray[np.float32]
_FREE = {"batch": 1, "groups": 1}
"""Sizes of graph inputs that are left empty, by the last part of the dimension's name; all others are none."""


def num_layers(model: ir.Model) -> int:
    """Layers of ``model``: each has two arrays of cache or of state."""
    return sum(str(value.name).startswith("present") for value in model.graph.outputs) // 2


def embed(model: ir.Model, folder: Path, ids: Sequence[int]) -> Array:
    """What goes into the first layer [1, tokens, hidden]."""
    segment = Segment(model, folder, ["input_ids"], [f"{HIDDEN}.0"])
    return segment.run({"input_ids": np.array([ids], np.int64)})[0]


def hidden_states(model: ir.Model, folder: Path, ids: Sequence[int]) -> Array:
    """What the layers make of every token [1, tokens, hidden], normalized."""
    x = embed(model, folder, ids)
    for index in range(num_layers(model)):
        x = Layer(model, folder, index).append(x)
    return normalized(model, folder, x)


def normalized(model: ir.Model, folder: Path, x: Array) -> Array:
    """The last layer's output [1, tokens, hidden] after the final norm."""
    source = f"{HIDDEN}.{num_layers(model)}"
    return Segment(model, folder, [source], [HIDDEN_STATES]).run({source: x})[0]


def final_hidden(model: ir.Model, folder: Path, x: Array, positions: Sequence[int]) -> Array:
    """What goes into the head [positions, hidden], from the last layer's output [1, tokens, hidden]."""
    source = f"{HIDDEN}.{num_layers(model)}"
    segment = Segment(model, folder, [source, "logits_indices"], [FINAL_HIDDEN])
    return segment.run({source: x, "logits_indices": np.array(positions, np.int64)})[0]


def rescored(model: ir.Model, folder: Path, hidden: Array, coarse: Array) -> Array:
    """Logits [positions, padded_vocab] of a head in two stages, from what goes into it and its coarse logits."""
    segment = Segment(model, folder, [FINAL_HIDDEN, COARSE_LOGITS], ["logits"])
    # One position at a time: each takes the candidates' rows in float32.
    rows = zip(hidden[:, None], coarse[:, None], strict=True)
    return np.concatenate([segment.run({FINAL_HIDDEN: x, COARSE_LOGITS: y})[0] for x, y in rows])


@contextmanager
def refusals() -> Iterator[None]:
    """Translate what onnxruntime raises: one class per status, without a common base but their module."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        first = str(error).partition("\n")[0]
        raise ExportError(f"onnxruntime refuses the graph: {first}", hint=DEFECT) from None


def check_finite(array: NDArray[Any], what: str) -> None:
    """Refuse an ``array`` that holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise ExportError(f"self-test: {what} not finite", hint="the checkpoint is damaged, or try --recipe int8")


def needed_inputs(target: ir.Value, source: ir.Value) -> list[ir.Value]:
    """Graph inputs that ``target`` depends on besides ``source``."""
    found: dict[ir.Value, None] = {}
    seen, stack = {source}, [target]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_input():
            found[value] = None
        elif (node := value.producer()) is not None:
            stack += [each for each in node.inputs if each is not None]
    return list(found)


def empty(value: ir.Value) -> NDArray[Any]:
    """A graph input without content: no past, no adapters."""
    assert value.shape is not None
    assert value.dtype is not None
    sizes = [dim if isinstance(dim, int) else _FREE.get(str(dim).rpartition(".")[2], 0) for dim in value.shape]
    return np.zeros(sizes, value.dtype.numpy())


def lengths(past: int, count: int) -> dict[str, NDArray[np.int32]]:
    """The inputs that say how many tokens there are, when ``count`` follow on ``past``."""
    total = past + count
    return {"seqlens_k": np.array([total - 1], np.int32), "total_sequence_length": np.array(total, np.int32)}


def between(model: ir.Model, folder: Path, source: ir.Value, target: ir.Value) -> Callable[[NDArray[Any]], Array]:
    """Computes ``target`` [1, tokens, columns] of a text from ``source``, loaded by itself.

    Args:
        model: the graph; it may be unfinished.
        folder: where its data file is.
        source: what the function takes, as [1, tokens] or [1, tokens, columns].
        target: what it gives.

    Raises:
        ExportError: onnxruntime refuses the part.
    """
    target.type = ir.TensorType(ir.DataType.FLOAT)
    nothing = {str(value.name): empty(value) for value in needed_inputs(target, source)}
    segment = Segment(model, folder, [str(source.name), *nothing], [str(target.name)])

    def run(x: NDArray[Any]) -> Array:
        known = lengths(0, x.shape[1])
        inputs = {name: known.get(name, value) for name, value in nothing.items()}
        y: Array = segment.run({str(source.name): x, **inputs})[0]
        return y

    return run


class Layer:
    """One layer with a cache or a state of its own, loaded by itself.

    Args:
        model: the whole graph.
        folder: where its data file is.
        index: of the layer.
    """

    def __init__(self, model: ir.Model, folder: Path, index: int) -> None:
        self._index = index
        values = {str(value.name): value for node in model.graph for value in node.outputs}
        self._source, target = f"{HIDDEN}.{index}", f"{HIDDEN}.{index + 1}"
        needed = {str(value.name): value for value in needed_inputs(values[target], values[self._source])}
        # Sorted, so that a key comes before its value.
        self._pasts = sorted(name for name in needed if name.startswith("past"))
        self._lengths = needed.keys() & lengths(0, 0).keys()
        self._constant = {name: empty(value) for name, value in needed.items() if name not in self._lengths}
        presents = [present_name(name) for name in self._pasts]
        self._segment = Segment(model, folder, [self._source, *needed], [target, *presents])
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self._tokens = 0
        self._memory = [self._constant[name] for name in self._pasts]

    @property
    def cache(self) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Keys and values [1, kv_heads, tokens, head_dim] so far, in the graph's number format, if it has a cache."""
        if not self._pasts[0].startswith("past_key_values"):
            return None
        key, value = self._memory
        return key, value

    def append(self, x: Array) -> Array:
        """Run the layer over further tokens [1, n, hidden]; returns its output for them, of the same shape.

        Raises:
            ExportError: onnxruntime refuses the layer, or its output is not finite.
        """
        count = x.shape[1]
        known = {name: value for name, value in lengths(self._tokens, count).items() if name in self._lengths}
        memory = dict(zip(self._pasts, self._memory, strict=True))
        y, *self._memory = self._segment.run({**self._constant, **known, **memory, self._source: x})
        self._tokens += count
        check_finite(y, f"layer {self._index} is")
        return y


class Segment:
    """A part of the graph between named values, loaded by itself.

    Args:
        model: the graph; it may be unfinished.
        folder: where its data file is.
        inputs: names of what goes in, all that the part needs.
        outputs: names of what comes out.

    Raises:
        ExportError: onnxruntime refuses it.
    """

    def __init__(self, model: ir.Model, folder: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        graph = ir.convenience.extract(model.graph, inputs, outputs)
        graph.opset_imports.update(model.graph.opset_imports)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # A run or two do not pay for an arena, which grows by doubling and keeps what it has.
        options.enable_cpu_mem_arena = False
        # Nor do threads that wait for the next run, while others are at work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString()
        with refusals():
            self._session = ort.InferenceSession(proto, options, ["CPUExecutionProvider"])
        self._outputs = list(outputs)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs, in order.

        Raises:
            ExportError: onnxruntime refuses the inputs.
        """
        with refusals():
            results: list[NDArray[Any]] = self._session.run(self._outputs, inputs)
        return results
