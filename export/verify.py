"""Does the bundle compute what the checkpoint says? Checks that every export runs before it may be called a bundle.

:func:`check_kernels` proves the layout of every quantized matrix: onnxruntime's kernel at accuracy level 0 against the
dequantized values. :func:`self_test` runs a prompt through the finished files, one layer at a time, so that even a 7B
is tested in a few hundred megabytes. Parity of the graph itself with other libraries is in ``export.oracle``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edge.errors import ExportError
from export.graph import COARSE_LOGITS, HIDDEN, HIDDEN_STATES
from export.quantize.blockwise import QuantizedRows, dequantize_rows
from export.quantize.recipes import Blockwise
from export.segments import (
    DEFECT,
    Layer,
    Segment,
    check_finite,
    embed,
    final_hidden,
    hidden_states,
    num_layers,
    refusals,
    rescored,
)

KERNEL_TOLERANCE = 1e-5
"""Largest difference between kernel and dequantized product, relative to the product's largest value."""
_SAMPLE_ROWS = 64
_HEAD_ROWS = 8192
_RESCORED_ROWS = 8
"""Positions whose candidates are looked up at once: pages of the table stay in memory as long as their session."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SelfTest:
    """What running a prompt through a bundle showed."""

    prompt_ids: list[int]
    next_id: int
    """The most likely token after the prompt."""
    chunked_difference: float
    """Largest difference of a hidden state between one prefill and prefill plus decode, relative to the largest."""


@dataclass(frozen=True)
class MtpTest:
    """What running the head of multi-token prediction over the same prompt showed."""

    next_id: int
    """Its guess of the token after :attr:`SelfTest.next_id`."""
    chunked_difference: float
    """As in :class:`SelfTest`."""


def check_kernels(model: ir.Model) -> float:
    """Run the first rows of every quantized matrix of ``model`` through the real kernel.

    Returns:
        The largest relative difference found.

    Raises:
        ExportError: a matrix differs by more than :data:`KERNEL_TOLERANCE`, or onnxruntime refuses it.
    """
    worst, rng = 0.0, np.random.default_rng(0)
    for node in model.graph:
        if node.op_type != "MatMulNBits":
            continue
        form, columns = _form(node), node.attributes["K"].as_int()
        x = rng.standard_normal((3, columns), dtype=np.float32)
        rows = _quantized_rows(node, 0, _SAMPLE_ROWS)
        expected = x @ dequantize_rows(rows, form, columns).T
        with refusals():
            found = _run_kernel(x, rows, form, accuracy_level=0)
        difference = float(np.abs(found - expected).max() / _largest(expected))
        worst = max(worst, difference)
        if not difference <= KERNEL_TOLERANCE:
            raise ExportError(f"{node.name}: kernel and codes differ by {difference:.1e}", hint=DEFECT)
    return worst


def self_test(model: ir.Model, folder: Path, prompt_ids: Sequence[int]) -> SelfTest:
    """Run a prompt of at least two tokens through the graph in ``folder``, layer by layer.

    Raises:
        ExportError: onnxruntime refuses the graph, or a layer's output is not finite.
    """
    x, drift = embed(model, folder, prompt_ids), 0.0
    for index in range(num_layers(model)):
        x, difference = _run_twice(Layer(model, folder, index), x)
        drift = max(drift, difference)
    logits = head_logits(model, folder, final_hidden(model, folder, x, [len(prompt_ids) - 1]))
    return SelfTest(list(prompt_ids), int(logits.argmax()), drift)


def mtp_self_test(head: ir.Model, main: ir.Model, folder: Path, tested: SelfTest) -> MtpTest:
    """Run the head of multi-token prediction over the prompt that the model was tested with.

    Args:
        head: its graph.
        main: that of the model.
        folder: where both lie.
        tested: what the model made of the prompt.

    Raises:
        ExportError: onnxruntime refuses the graph, or an output is not finite.
    """
    hidden = hidden_states(main, folder, tested.prompt_ids)
    # Each position with the token that follows it; the last is followed by the model's own guess.
    ids = np.array([[*tested.prompt_ids[1:], tested.next_id]], np.int64)
    first = Segment(head, folder, ["input_ids", HIDDEN_STATES], [f"{HIDDEN}.0"])
    (x,) = first.run({"input_ids": ids, HIDDEN_STATES: hidden})
    x, drift = _run_twice(Layer(head, folder, 0), x)
    logits = head_logits(head, folder, final_hidden(head, folder, x, [ids.size - 1]))
    return MtpTest(int(logits.argmax()), drift)


def _run_twice(layer: Layer, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """A layer's output for ``x`` all at once, and how far its last token is from that of prefill plus one step."""
    whole = layer.append(x)
    layer.clear()
    layer.append(x[:, :-1])
    step = layer.append(x[:, -1:])
    return whole, float(np.abs(whole[:, -1:] - step).max() / _largest(whole))


def head_logits(model: ir.Model, folder: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits [positions, padded_vocab] of final hidden states [positions, hidden], some rows of the head at a time.

    Raises:
        ExportError: onnxruntime refuses the head, or the logits are not finite.
    """
    # In two stages, the product with the whole vocabulary makes the coarse logits.
    coarse = next((node for node in model.graph if node.outputs[0].name == COARSE_LOGITS), None)
    logits = _product(coarse or _logits_node(model), x)
    if coarse is not None:
        parts = range(0, len(x), _RESCORED_ROWS)
        logits = np.concatenate(
            [rescored(model, folder, x[i : i + _RESCORED_ROWS], logits[i : i + _RESCORED_ROWS]) for i in parts]
        )
    check_finite(logits, "the logits are")
    return logits


def _logits_node(model: ir.Model) -> ir.Node:
    node = next(value.producer() for value in model.graph.outputs if value.name == "logits")
    assert node is not None
    return node


def _product(node: ir.Node, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a node makes of ``x`` and its matrix, some rows of the matrix at a time; or the sum of two such nodes."""
    if node.op_type == "Add":
        first, second = (value.producer() for value in node.inputs if value is not None)
        assert first is not None
        assert second is not None
        return _product(first, x) + _product(second, x)
    x, parts = _columns(node, x), []
    weights = node.inputs[1]
    assert weights is not None
    assert weights.const_value is not None
    for start in range(0, weights.const_value.shape.numpy()[0], _HEAD_ROWS):
        stop = start + _HEAD_ROWS
        if node.op_type == "MatMulNBits":
            level = node.attributes["accuracy_level"].as_int()
            rows = _quantized_rows(node, start, stop)
            parts.append(_run_kernel(x, rows, _form(node), accuracy_level=level))
        else:
            parts.append(x @ _rows(weights, start, stop).T)
    return np.concatenate(parts, axis=1)


def _columns(node: ir.Node, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Those columns of ``x`` that go into a product."""
    gather = None if node.inputs[0] is None else node.inputs[0].producer()
    if gather is None or gather.op_type != "Gather" or gather.attributes["axis"].as_int() != -1:
        return x
    chosen = gather.inputs[1]
    assert chosen is not None
    assert chosen.const_value is not None
    return x[:, chosen.const_value.numpy()]


def _form(node: ir.Node) -> Blockwise:
    return Blockwise(
        bits=node.attributes["bits"].as_int(),
        block=node.attributes["block_size"].as_int(),
        symmetric=node.inputs[3] is None,
    )


def _quantized_rows(node: ir.Node, start: int, stop: int) -> QuantizedRows:
    codes, scales, zero_points = node.inputs[1:4]
    return QuantizedRows(
        codes=_rows(codes, start, stop),
        scales=_rows(_stored(scales), start, stop).astype(np.float32),
        zero_points=None if zero_points is None else _rows(zero_points, start, stop),
    )


def _stored(scales: ir.Value | None) -> ir.Value | None:
    """The initializer of scales that the graph converts."""
    cast = None if scales is None else scales.producer()
    return scales if cast is None else cast.inputs[0]


def _rows(value: ir.Value | None, start: int, stop: int) -> NDArray[Any]:
    """Some rows of an initializer; only those are read from the data file."""
    assert value is not None
    assert isinstance(value.const_value, ir.ExternalTensor)
    rows = np.array(value.const_value.numpy()[start:stop])
    value.const_value.release()
    return rows


def _run_kernel(
    x: NDArray[np.float32], rows: QuantizedRows, form: Blockwise, *, accuracy_level: int
) -> NDArray[np.float32]:
    """``x @ W.T`` by MatMulNBits, in a model of one node."""
    count, columns = len(rows.codes), x.shape[1]
    arrays: Arrays = {"x": x, "codes": rows.codes, "scales": rows.scales}
    if rows.zero_points is not None:
        arrays["zero_points"] = rows.zero_points
    inputs = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        for name, array in arrays.items()
    ]
    sizes = {"K": columns, "N": count, "bits": form.bits, "block_size": form.block, "accuracy_level": accuracy_level}
    node = ir.node("MatMulNBits", inputs, sizes, domain="com.microsoft")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(x), count])
    for value, array in zip(inputs[1:], list(arrays.values())[1:], strict=True):
        value.const_value = ir.tensor(array, name=value.name)
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph(inputs[:1], [y], nodes=[node], initializers=inputs[1:], opset_imports=opsets, name="kernel")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


def _largest(array: NDArray[np.float32]) -> float:
    """Largest absolute value, never zero: a divisor."""
    return max(float(np.abs(array).max()), float(np.finfo(np.float32).tiny))
