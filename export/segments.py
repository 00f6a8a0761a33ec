"""A finished graph, run a piece at a time over its data file, so that even a 7B runs in a few hundred megabytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edge.errors import ExportError
from export.graph import COARSE_LOGITS, FINAL_HIDDEN, HIDDEN
from export.lora import no_adapters

DEFECT = "this is a defect of qwedge or of onnxruntime: please report it"
Array = NDArray[np.float32]


def num_layers(model: ir.Model) -> int:
    """Layers that ``model`` has a cache for."""
    return sum(str(value.name).startswith("present.") for value in model.graph.outputs) // 2


def embed(model: ir.Model, folder: Path, ids: Sequence[int]) -> Array:
    """What goes into the first layer [1, tokens, hidden]."""
    segment = Segment(model, folder, ["input_ids"], [f"{HIDDEN}.0"])
    return segment.run({"input_ids": np.array([ids], np.int64)})[0]


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


class Layer:
    """One layer with a cache of its own, loaded by itself.

    Args:
        model: the whole graph.
        folder: where its data file is.
        index: of the layer.
    """

    def __init__(self, model: ir.Model, folder: Path, index: int) -> None:
        self._index = index
        self._source, target = f"{HIDDEN}.{index}", f"{HIDDEN}.{index + 1}"
        self._pasts = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        presents = [f"present.{index}.{kind}" for kind in ("key", "value")]
        self._no_adapters = no_adapters(model, index)
        inputs = [self._source, "seqlens_k", "total_sequence_length", *self._pasts, *self._no_adapters]
        self._segment = Segment(model, folder, inputs, [target, *presents])
        past = next(value for value in model.graph.inputs if value.name == self._pasts[0])
        assert past.shape is not None
        assert past.dtype is not None
        # The free dimensions are batch, which is one, and length, which is none.
        sizes = [dim if isinstance(dim, int) else 0 for dim in past.shape[1:]]
        self._empty = np.zeros((1, *sizes), past.dtype.numpy())
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self._cache = [self._empty, self._empty]

    @property
    def cache(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and values [1, kv_heads, tokens, head_dim] of the tokens so far, in the graph's number format."""
        key, value = self._cache
        return key, value

    def append(self, x: Array) -> Array:
        """Run the layer over further tokens [1, n, hidden]; returns its output for them, of the same shape.

        Raises:
            ExportError: onnxruntime refuses the layer, or its output is not finite.
        """
        total = self._cache[0].shape[2] + x.shape[1]
        lengths = {"seqlens_k": np.array([total - 1], np.int32), "total_sequence_length": np.array(total, np.int32)}
        past = dict(zip(self._pasts, self._cache, strict=True))
        y, *self._cache = self._segment.run({self._source: x, **lengths, **past, **self._no_adapters})
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
