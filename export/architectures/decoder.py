"""The pre-norm decoder that Qwen models share: embedding, layers of attention and gated MLP, head.

A subclass says what its attention is made of. Sizes come from ``config.json`` under the checkpoint's own names.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.bundle import KVLayout, StateLayout
from edge.bundle.rotary import rotary_positions
from edge.errors import CheckpointError
from export.graph import COARSE_LOGITS, FINAL_HIDDEN, HIDDEN, HIDDEN_STATES, MIDDLE, GraphBuilder
from export.quantize.recipes import Blockwise, Format
from export.weights import Matrix, Split, Weights

Shapes = dict[str, tuple[int, ...]]
"""Tensor names and shapes, as the checkpoint stores them."""
Table = Matrix | Split
"""Embedding or head in the data file: taken apart, where logits come in two stages."""
EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FINAL_NORM = "model.norm.weight"
_MOST_LAYERS = 1024
"""Ten times the deepest model: a damaged config must not list tensors without end."""


@dataclass(frozen=True)
class Built:
    """What became of a model in its graph."""

    bytes_per_token: int
    """Of weights that one decode step reads: all matrices but the embedding, of which it reads one row."""
    embedding: Table
    head: Table
    """The embedding itself, where they are tied."""


class Decoder(ABC):
    """What a checkpoint with this ``config.json`` must hold, and the graph it becomes.

    Raises:
        CheckpointError: the config lacks a field or asks for something unsupported.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.hidden_size = positive_int(config, "hidden_size")
        self.intermediate_size = positive_int(config, "intermediate_size")
        self.num_layers = positive_int(config, "num_hidden_layers")
        self.num_heads = positive_int(config, "num_attention_heads")
        self.num_kv_heads = positive_int(config, "num_key_value_heads", self.num_heads)
        self.head_dim = positive_int(config, "head_dim", self.hidden_size // self.num_heads)
        self.padded_vocab_size = positive_int(config, "vocab_size")
        self.max_positions = positive_int(config, "max_position_embeddings")
        self.rms_norm_eps = positive_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6))
        self.rope_theta = rope_theta(config)
        self.rotary_dim = self.head_dim
        """Width of a head's part that is rotated, its first."""
        self.tied = bool(config.get("tie_word_embeddings", False))
        self.model_type = str(config["model_type"])
        self._check_sizes()
        _refuse_unsupported(config)

    @abstractmethod
    def attention_tensors(self, layer: int) -> Shapes:
        """Tensors of one layer's attention."""

    @abstractmethod
    def attention(self, graph: GraphBuilder, layer: int, x: ir.Value, rotary: tuple[ir.Value, ir.Value]) -> ir.Value:
        """One layer's attention over normalized ``x`` [batch, sequence, hidden], output projection included."""

    @property
    def hidden_shape(self) -> list[int | str]:
        """Of hidden states, as graphs name it."""
        return ["batch", "sequence", self.hidden_size]

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads."""
        return self.num_kv_heads * self.head_dim

    def kv_layout(self) -> KVLayout:
        """Shape of the cache the graph asks for."""
        return KVLayout(layers=self.num_layers, kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    def state_layout(self) -> StateLayout | None:
        """Shape of the state of linear attention that the graph asks for; None where no layer has any."""
        return None

    def norm(self, graph: GraphBuilder, x: ir.Value, weight: str) -> ir.Value:
        """RMS normalization of ``x`` over its last axis by a tensor of the checkpoint."""
        return graph.rms_norm(x, weight, self.rms_norm_eps, self.norm_weights)

    def norm_weights(self, stored: NDArray[np.float32]) -> NDArray[np.float32]:
        """What :meth:`norm` multiplies by, of what the checkpoint has."""
        return stored

    def head_norm(self, graph: GraphBuilder, x: ir.Value, weight: str, size: int) -> ir.Value:
        """Normalize each head of ``x`` [batch, sequence, size] by itself."""
        split = graph.op("Reshape", [x, graph.constant("heads_shape", [0, 0, -1, self.head_dim])])
        normed = self.norm(graph, split, weight)
        return graph.op("Reshape", [normed, graph.constant(f"width_{size}", [0, 0, size])])

    def qkv(self, graph: GraphBuilder, prefix: str, x: ir.Value, *, has_bias: bool = False) -> ir.Value:
        """Query, key and value of ``x``, end to end: one product, or two where values have a format of their own."""
        formats = graph.weights.recipe.layer
        query_key, value = formats.query_key or formats.qkv, formats.value or formats.qkv
        groups = {"qk": query_key, "v": value} if formats.splits_values else {"qkv": value}
        products = []
        for parts, form in groups.items():
            weights, biases = ([f"{prefix}{part}_proj.{kind}" for part in parts] for kind in ("weight", "bias"))
            products.append(graph.linear(x, f"{prefix}{parts}_proj", form, weights, biases if has_bias else ()))
        return graph.op("Concat", products, axis=-1) if len(products) > 1 else products[0]

    def tensors(self) -> Shapes:
        """Every tensor the checkpoint must hold, and no other."""
        table = (self.padded_vocab_size, self.hidden_size)
        shapes: Shapes = {EMBEDDING: table, _FINAL_NORM: (self.hidden_size,)}
        for layer in range(self.num_layers):
            shapes |= self.attention_tensors(layer) | self.mlp_tensors(layer_prefix(layer))
        if not self.tied:
            shapes[_HEAD] = table
        return shapes

    def mlp_tensors(self, prefix: str) -> Shapes:
        """Tensors of a layer besides its attention, under names that start with ``prefix``."""
        return {
            f"{prefix}input_layernorm.weight": (self.hidden_size,),
            f"{prefix}post_attention_layernorm.weight": (self.hidden_size,),
            f"{prefix}mlp.gate_proj.weight": (self.intermediate_size, self.hidden_size),
            f"{prefix}mlp.up_proj.weight": (self.intermediate_size, self.hidden_size),
            f"{prefix}mlp.down_proj.weight": (self.hidden_size, self.intermediate_size),
        }

    def parameter_count(self) -> int:
        """Parameters of the model; a tied table counts once."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def check(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Compare a checkpoint's tensors with :meth:`tensors`.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape; names them.
        """
        expected = self.tensors()
        if self.tied and found.get(_HEAD) == expected[EMBEDDING]:
            # Some checkpoints save the tied head a second time.
            found = {name: shape for name, shape in found.items() if name != _HEAD}
        layers = f"{self.model_type} with {self.num_layers} layers"
        compare_tensors(expected, found, f"the config says {layers}: do config and weights belong together?")

    def build(self, graph: GraphBuilder, context_length: int) -> Built:
        """Add the whole model to ``graph`` with rotary tables for ``context_length`` positions."""
        embedding = self._table(graph, "embed", EMBEDDING, is_head=self.tied)
        rotary = self.rotary(graph, context_length)
        x = graph.cut(graph.rows(graph.input_ids, embedding), f"{HIDDEN}.0", self.hidden_shape)
        for layer in range(self.num_layers):
            x = self.layer(graph, layer, x, rotary)
        x = self.norm(graph, x, _FINAL_NORM)
        graph.output(x, HIDDEN_STATES, ir.DataType.FLOAT, self.hidden_shape)
        head = embedding if self.tied else self._table(graph, "lm_head", _HEAD, is_head=True)
        # As rows of an embedding the codes are as good as before: the errors are as large, only other ones.
        graph.fit(head, x, "lm_head", EMBEDDING if self.tied else _HEAD)
        return Built(graph.matrix_bytes + self.head(graph, x, head), embedding, head)

    def rotary(self, graph: GraphBuilder, context_length: int) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines for the positions of so many tokens."""
        return graph.rotary_tables(self.rotary_dim, self.rope_theta, rotary_positions(context_length))

    def layer(self, graph: GraphBuilder, layer: int, x: ir.Value, rotary: tuple[ir.Value, ir.Value]) -> ir.Value:
        """Add one layer that takes ``x`` [batch, sequence, hidden]; cuts the graph in its middle and at its end."""
        prefix = layer_prefix(layer)
        normed = self.norm(graph, x, f"{prefix}input_layernorm.weight")
        x = graph.op("Add", [x, self.attention(graph, layer, normed, rotary)])
        x = graph.cut(x, f"{MIDDLE}.{layer}", self.hidden_shape)
        down = graph.weights.recipe.layer.down_of(layer, self.num_layers)
        x = graph.op("Add", [x, self.mlp(graph, prefix, x, down)])
        return graph.cut(x, f"{HIDDEN}.{layer + 1}", self.hidden_shape)

    def mlp(self, graph: GraphBuilder, prefix: str, x: ir.Value, down: Format) -> ir.Value:
        """SwiGLU (Shazeer 2020) of ``x``, normalized: down(silu(gate(x)) * up(x)), gate and up in one product."""
        x = self.norm(graph, x, f"{prefix}post_attention_layernorm.weight")
        sources = [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up")]
        both = graph.linear(x, f"{prefix}mlp.gate_up_proj", graph.weights.recipe.layer.gate_up, sources)
        gate, up = graph.ops("Split", [both], 2, axis=-1, num_outputs=2)
        active = graph.op("Mul", [graph.silu(gate), up])
        return graph.linear(active, f"{prefix}mlp.down_proj", down, [f"{prefix}mlp.down_proj.weight"])

    def _table(self, graph: GraphBuilder, name: str, source: str, *, is_head: bool) -> Table:
        weights, form = graph.weights, graph.weights.recipe.table
        if weights.recipe.head is None or not isinstance(form, Blockwise):
            return weights.matrix(name, [source], form)
        corrected = self._largest_channels(weights, weights.recipe.head.corrected) if is_head else None
        return weights.split(name, source, form, corrected)

    def head(self, graph: GraphBuilder, x: ir.Value, table: Table) -> int:
        """Logits of the positions asked for: the head is a quarter of a small model's work.

        Returns:
            Bytes of weights that one position reads.
        """
        rows = graph.op("Reshape", [x, graph.constant("flat_shape", [-1, self.hidden_size])])
        rows = graph.op("Gather", [rows, graph.logits_indices], axis=0)
        rows = graph.cut(rows, FINAL_HIDDEN, ["positions", self.hidden_size])
        logits, num_bytes = self._logits(graph, rows, table)
        graph.output(logits, "logits", ir.DataType.FLOAT, ["positions", self.padded_vocab_size])
        return num_bytes

    def _logits(self, graph: GraphBuilder, x: ir.Value, table: Table) -> tuple[ir.Value, int]:
        head = graph.weights.recipe.head
        if isinstance(table, Matrix):
            return graph.matmul(x, table), table.num_bytes
        assert head is not None
        coarse = graph.cut(graph.coarse(x, table), COARSE_LOGITS, ["positions", self.padded_vocab_size])
        num_bytes = table.coarse_bytes + table.row_bytes * head.candidates
        return graph.rescored(coarse, x, table, head.candidates), num_bytes

    def _largest_channels(self, weights: Weights, count: int) -> NDArray[np.int64]:
        """Channels of the final hidden state that are largest, told by what normalization multiplies them by."""
        factors = np.abs(self.norm_weights(weights.values(_FINAL_NORM)))
        return np.sort(np.argsort(-factors, kind="stable")[:count])

    def _check_sizes(self) -> None:
        reason = ""
        if self.num_heads % self.num_kv_heads:
            reason = f"{self.num_heads} attention heads are no multiple of {self.num_kv_heads} key heads"
        elif self.head_dim % 16:
            reason = f"head_dim {self.head_dim} is no multiple of 16, as GroupQueryAttention wants it to rotate"
        elif self.hidden_size % 32:
            reason = f"hidden_size {self.hidden_size} is no multiple of 32, the smallest block of GatherBlockQuantized"
        elif self.num_layers > _MOST_LAYERS:
            reason = f"num_hidden_layers is {self.num_layers}"
        if reason:
            raise CheckpointError(f"this model cannot be exported: {reason}", hint="check config.json")


def compare_tensors(expected: Shapes, found: Mapping[str, tuple[int, ...]], hint: str) -> None:
    """Compare a checkpoint's tensors with those that it should hold.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape; names them, with ``hint``.
    """
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}", hint=hint)
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"the checkpoint holds tensors with no place in the model: {_some(extra)}", hint=hint)
    wrong = [
        f"{name} is {list(found[name])} instead of {list(expected[name])}"
        for name in sorted(expected)
        if found[name] != expected[name]
    ]
    if wrong:
        raise CheckpointError(f"tensors of the wrong shape: {_some(wrong)}", hint=hint)


def layer_prefix(layer: int) -> str:
    """Name prefix of a layer's tensors, with its closing dot."""
    return f"model.layers.{layer}."


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    hint = "export a model of the supported families: qwedge export --list"
    if config.get("use_sliding_window"):
        raise CheckpointError("sliding-window attention is not supported", hint=hint)
    for key in ("rope_scaling", "rope_parameters"):
        scaling = _object(config, key)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"rope scaling of type {kind!r} is not supported", hint=hint)
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"the activation {config['hidden_act']!r} is not supported", hint=hint)


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number of the config.

    Raises:
        CheckpointError: it is missing without a default, or no positive whole number.
    """
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"config.json: {key} is {value!r}, not a positive whole number", hint="check config.json")
    return value


def rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base."""
    return positive_number("rope_theta", rope_parameter(config, "rope_theta", 10000.0))


def rope_parameter(config: Mapping[str, Any], key: str, default: float) -> Any:
    """A number of the rotary embedding: by itself, or in ``rope_parameters`` as transformers 5 writes it."""
    return config.get(key, _object(config, "rope_parameters").get(key, default))


def positive_number(key: str, value: Any) -> float:
    """A positive finite number of the config.

    Raises:
        CheckpointError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} is {value!r}, not a positive number", hint="check config.json")
    return float(value)


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key} is {value!r}, not an object", hint="check config.json")
    return value


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
