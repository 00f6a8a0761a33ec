"""An int8 cache: the scale of every key and value channel, from a run over a built-in text, put into the graph.

GroupQueryAttention stores ``round(x / scale)`` within -128..127 and computes with that times the scale. The scales are
constants, so what lies beyond 127 of them is cut off. Hence the largest value that the text brings forth sets a
channel's scale, with a margin for texts unseen; scales of least squared error gave no better logits (docs/export.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.bundle.rotary import POSITIONS
from export.graph import ROTARY_FREQUENCIES
from export.segments import Array, Layer, embed, final_hidden, num_layers
from export.verify import head_logits

WINDOW = 512
"""Tokens of the text that see each other. Every window starts anew, because the first token has the largest keys."""
_MAX_WINDOWS = 4
_ROTATIONS = 32
_EVERY = 32
"""Logits are compared after every 32nd token: enough to average; a row takes 600 kB, several times over."""
_LARGEST_CODE = 127
_MARGIN = 1.25
"""Room above the largest value seen: cutting off costs more than coarser steps."""
_FLOOR = 1e-3
"""Least scale of a channel, of the largest in its layer: a channel that was silent may speak."""
_SCALE_INPUTS = {"key": 12, "value": 13}
"""Places of GroupQueryAttention's scales; past is 9 before and present, an output, 11 before."""


@dataclass(frozen=True)
class LayerScales:
    """What one step of the codes is worth, by channel [1, kv_heads, 1, head_dim]."""

    key: Array
    value: Array


@dataclass(frozen=True)
class Calibration:
    """A run of the float32 cache over the text."""

    scales: list[LayerScales]
    hidden: Array
    """What went into the head [positions, hidden]."""
    error: float
    """Largest error of a layer's keys or values when stored so: Euclidean norm relative to theirs."""


@dataclass(frozen=True)
class CacheTest:
    """The int8 cache against the float32 cache, over the calibration text."""

    positions: int
    """Places in the text where logits were compared."""
    kl: float
    """Mean Kullback-Leibler divergence from the float32 cache's distribution of the next token, in nats."""
    top1: float
    """Share of places where both find the same token most likely."""
    error: float
    """Of the keys and values themselves, see :class:`Calibration`."""


def calibrate(model: ir.Model, folder: Path, ids: Sequence[int]) -> Calibration:
    """Run tokens through a graph with a float32 cache, layer by layer, and choose the scales.

    Raises:
        ExportError: onnxruntime refuses the graph, or a layer's output is not finite.
    """
    text, rotations = _Text(model, folder, ids), _rotations(model)
    scales: list[LayerScales] = []
    error = 0.0
    for index in range(num_layers(model)):
        cache = text.pass_layer(index)
        if cache is None:
            continue
        keys, values = cache
        layer = LayerScales(_scale(key_reach(keys, *rotations)), _scale(np.abs(values).max(axis=2)))
        scales.append(layer)
        error = max(error, _error(keys, layer.key), _error(values, layer.value))
    return Calibration(scales, text.hidden(), error)


def quantize_cache(model: ir.Model, scales: Sequence[LayerScales]) -> None:
    """Turn the float32 cache of ``model`` into an int8 cache, in place."""
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for index, (node, scale) in enumerate(zip(nodes, scales, strict=True)):
        node.resize_inputs(14)
        _store_as_int8(model.graph, node, f"kv_scale.{index}", "key", scale.key)
        _store_as_int8(model.graph, node, f"kv_scale.{index}", "value", scale.value)
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))


def cache_test(model: ir.Model, folder: Path, ids: Sequence[int], reference: Calibration) -> CacheTest:
    """Compare the graph that :func:`quantize_cache` changed with its calibration over the same tokens.

    Raises:
        ExportError: onnxruntime refuses the graph, or a layer's output is not finite.
    """
    text = _Text(model, folder, ids)
    for index in range(num_layers(model)):
        text.pass_layer(index)
    expected, found = (head_logits(model, folder, hidden) for hidden in (reference.hidden, text.hidden()))
    top1 = float((expected.argmax(axis=1) == found.argmax(axis=1)).mean())
    return CacheTest(len(found), float(divergence(expected, found).mean()), top1, reference.error)


def divergence(expected: Array, found: Array) -> Array:
    """Kullback-Leibler divergence of each row's distribution, both given as logits [rows, vocabulary], in nats."""
    return np.array([_row_divergence(p, q) for p, q in zip(expected, found, strict=True)], np.float32)


def key_reach(keys: Array, cos: Array, sin: Array) -> Array:
    """Largest absolute value of each key channel [1, kv_heads, head_dim], wherever in the context its token stands.

    The cache holds rotated keys. The text shows them at its own positions only; further rotations show the others.

    Args:
        keys: as cached [1, kv_heads, tokens, head_dim].
        cos: cosines of further rotations [rotations, rotary_dim / 2].
        sin: their sines.
    """
    reach: Array = np.abs(keys).max(axis=2)
    half = cos.shape[1]
    # The rotary embedding turns channel d together with channel d + rotary_dim / 2, and leaves those behind alone.
    first, second, still = np.split(keys, [half, 2 * half], axis=-1)
    for c, s in zip(cos, sin, strict=True):
        turned = np.concatenate([first * c - second * s, first * s + second * c, still], axis=-1)
        reach = np.maximum(reach, np.abs(turned).max(axis=2))
    return reach


class _Text:
    """Tokens on their way through the layers, in windows that do not see each other."""

    def __init__(self, model: ir.Model, folder: Path, ids: Sequence[int]) -> None:
        self._model, self._folder = model, folder
        window = min(WINDOW, int(_constant(model, POSITIONS)))
        starts = range(0, min(len(ids), _MAX_WINDOWS * window), window)
        self._windows = [embed(model, folder, ids[start : start + window]) for start in starts]

    def pass_layer(self, index: int) -> tuple[Array, Array] | None:
        """Run all windows through a layer; returns what its cache held, all windows end to end, if it has one."""
        layer, caches = Layer(self._model, self._folder, index), []
        for number, x in enumerate(self._windows):
            layer.clear()
            self._windows[number] = layer.append(x)
            caches += [layer.cache] if layer.cache else []
        if not caches:
            return None
        keys, values = zip(*caches, strict=True)
        return np.concatenate(keys, axis=2), np.concatenate(values, axis=2)

    def hidden(self) -> Array:
        """What goes into the head at the positions to compare, after the last layer."""
        x = np.concatenate(self._windows, axis=1)
        return final_hidden(self._model, self._folder, x, range(_EVERY - 1, x.shape[1], _EVERY))


def _rotations(model: ir.Model) -> tuple[Array, Array]:
    """Cosines and sines of rotations spread over the whole context."""
    positions = np.linspace(0, int(_constant(model, POSITIONS)) - 1, _ROTATIONS).astype(np.int64)
    angles = np.outer(positions, _constant(model, ROTARY_FREQUENCIES))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _constant(model: ir.Model, name: str) -> NDArray[Any]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def _scale(reach: Array) -> Array:
    """Scales [1, kv_heads, 1, head_dim] with room for ``reach`` [1, kv_heads, head_dim] and the margin."""
    largest = float(reach.max()) or 1.0
    scales: Array = (np.maximum(reach, largest * _FLOOR) * (_MARGIN / _LARGEST_CODE)).astype(np.float32)
    return scales[:, :, None]


def _error(x: Array, scale: Array) -> float:
    stored = np.clip(np.rint(x / scale), -_LARGEST_CODE - 1, _LARGEST_CODE) * scale
    norm = float(np.linalg.norm(x)) or 1.0
    return float(np.linalg.norm(stored - x)) / norm


def _store_as_int8(graph: ir.Graph, node: ir.Node, prefix: str, kind: str, scale: Array) -> None:
    place, name = _SCALE_INPUTS[kind], f"{prefix}.{kind}"
    value = ir.Value(name=name, shape=ir.Shape(scale.shape), type=ir.TensorType(ir.DataType.FLOAT))
    # A few kilobytes a layer stand in the graph itself: in the data file each would take a page.
    value.const_value = ir.tensor(scale, name=name)
    graph.register_initializer(value)
    node.replace_input_with(place, value)
    past, present = node.inputs[place - 9], node.outputs[place - 11]
    assert past is not None
    past.type = present.type = ir.TensorType(ir.DataType.INT8)
    node.attributes.add(ir.AttrString(f"{kind[0]}_quant_type", "PER_CHANNEL"))


def _row_divergence(p: Array, q: Array) -> float:
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _log_softmax(logits: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
