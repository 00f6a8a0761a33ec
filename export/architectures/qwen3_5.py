"""Qwen3.5 (``model_type`` qwen3_5): three layers of Gated DeltaNet to each layer of gated full attention.

The text part only: of a checkpoint that sees and speaks, ``export.text_part`` takes what this needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.bundle import KVLayout, StateLayout
from edge.errors import CheckpointError
from export.architectures.decoder import (
    Decoder,
    Shapes,
    layer_prefix,
    positive_int,
    positive_number,
    rope_parameter,
)
from export.graph import GraphBuilder

MTP_PREFIX: Final = "mtp."
"""Starts the names of the tensors of multi-token prediction, which :mod:`export.architectures.mtp` makes a graph of."""
_LINEAR, _FULL = "linear_attention", "full_attention"
_L2_EPSILON = 1e-6
"""Of the normalization of queries and keys, in the sum of squares."""
_ROTATED_SHARE = 0.25
_HINT = "export a model of the supported families: qwedge export --list"

Array = NDArray[np.float32]


class Qwen3_5(Decoder):  # noqa: N801 - the makers' name, whose dot is a version's
    """Full attention with an output gate and partial rotary embedding; linear attention by the gated delta rule.

    Yang, Kautz & Hatamizadeh 2025, https://arxiv.org/abs/2412.06464 (Gated DeltaNet). Query and key heads of linear
    attention serve as many consecutive value heads each. All norms but that of linear attention multiply by 1 + weight.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        # One name, whether the checkpoint holds more than the text or not.
        self.model_type = "qwen3_5"
        self.rotary_dim = int(self.head_dim * _rotated_share(config))
        self.key_heads = positive_int(config, "linear_num_key_heads")
        self.value_heads = positive_int(config, "linear_num_value_heads")
        self.key_dim = positive_int(config, "linear_key_head_dim")
        self.value_dim = positive_int(config, "linear_value_head_dim")
        self.conv_width = positive_int(config, "linear_conv_kernel_dim")
        self.layer_types = _layer_types(config, self.num_layers)
        _refuse_other_attention(config)
        self._check_linear_sizes()

    @property
    def keys_size(self) -> int:
        """Width of all key (or query) heads of linear attention."""
        return self.key_heads * self.key_dim

    @property
    def values_size(self) -> int:
        """Width of all value heads of linear attention."""
        return self.value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.keys_size + self.values_size

    def kv_layout(self) -> KVLayout:
        """Shape of the cache: of the layers with full attention only."""
        return super().kv_layout().model_copy(update={"layers": self.layer_types.count(_FULL)})

    def state_layout(self) -> StateLayout | None:
        """Shape of the state of the layers with linear attention."""
        return StateLayout(
            layers=self.layer_types.count(_LINEAR),
            conv_channels=self.conv_channels,
            conv_kernel=self.conv_width - 1,
            value_heads=self.value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
        )

    def check(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Compare a checkpoint's tensors, but for those of multi-token prediction, with :meth:`tensors`.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape; names them.
        """
        super().check({name: shape for name, shape in found.items() if not name.startswith(MTP_PREFIX)})

    def attention_tensors(self, layer: int) -> Shapes:
        """Six tensors of full attention (the query's rows hold its gate too), or nine of linear attention."""
        prefix = _attention_prefix(layer, self.layer_types[layer])
        if self.layer_types[layer] == _FULL:
            return self.full_attention_tensors(prefix)
        return {
            f"{prefix}in_proj_qkv.weight": (self.conv_channels, self.hidden_size),
            f"{prefix}in_proj_z.weight": (self.values_size, self.hidden_size),
            f"{prefix}in_proj_b.weight": (self.value_heads, self.hidden_size),
            f"{prefix}in_proj_a.weight": (self.value_heads, self.hidden_size),
            f"{prefix}conv1d.weight": (self.conv_channels, 1, self.conv_width),
            f"{prefix}A_log": (self.value_heads,),
            f"{prefix}dt_bias": (self.value_heads,),
            f"{prefix}norm.weight": (self.value_dim,),
            f"{prefix}out_proj.weight": (self.hidden_size, self.values_size),
        }

    def full_attention_tensors(self, prefix: str) -> Shapes:
        """Tensors of full attention, under names that start with ``prefix``."""
        return {
            f"{prefix}q_proj.weight": (2 * self.q_size, self.hidden_size),
            f"{prefix}k_proj.weight": (self.kv_size, self.hidden_size),
            f"{prefix}v_proj.weight": (self.kv_size, self.hidden_size),
            f"{prefix}o_proj.weight": (self.hidden_size, self.q_size),
            f"{prefix}q_norm.weight": (self.head_dim,),
            f"{prefix}k_norm.weight": (self.head_dim,),
        }

    def norm_weights(self, stored: Array) -> Array:
        """They are stored less one."""
        return stored + np.float32(1.0)

    def attention(self, graph: GraphBuilder, layer: int, x: ir.Value, rotary: tuple[ir.Value, ir.Value]) -> ir.Value:
        """Full or linear attention, as the config says of the layer."""
        kind = self.layer_types[layer]
        prefix = _attention_prefix(layer, kind)
        # Caches and states are numbered among the layers of their kind.
        index = self.layer_types[:layer].count(kind)
        if kind == _FULL:
            return self.full_attention(graph, prefix, index, x, rotary)
        return self._linear_attention(graph, prefix, index, x)

    def full_attention(
        self, graph: GraphBuilder, prefix: str, index: int, x: ir.Value, rotary: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        """Gated attention over normalized ``x`` [batch, sequence, hidden] with cache ``index``, projection included."""
        packed = self.qkv(graph, prefix, x)
        sizes = graph.constant("qkv_sizes", [2 * self.q_size, self.kv_size, self.kv_size])
        both, key, value = graph.ops("Split", [packed, sizes], 3, axis=-1)
        query, gate = self._query_and_gate(graph, both, f"{prefix}q_norm.weight")
        key = self.head_norm(graph, key, f"{prefix}k_norm.weight", self.kv_size)
        widths = (self.q_size, self.kv_size, self.kv_size)
        rows = [self._cache_rows(graph, *each) for each in zip((query, key, value), widths, strict=True)]
        heads = {"num_heads": self.num_heads, "kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        attended = graph.attention(index, (rows[0], rows[1], rows[2]), rotary, **heads)
        attended = graph.op("Reshape", [attended, graph.op("Shape", [gate])])
        gated = graph.op("Mul", [attended, graph.op("Sigmoid", [gate])])
        return graph.linear(gated, f"{prefix}o_proj", graph.weights.recipe.layer.out, [f"{prefix}o_proj.weight"])

    def _cache_rows(self, graph: GraphBuilder, x: ir.Value, width: int) -> ir.Value:
        """``x`` [batch, sequence, width] with a row for each row of the cache, as many as ``seqlens_k`` has.

        Guessed tokens follow each other in the states of one sequence, and are rows of their own for full attention.
        """
        shape = [graph.op("Shape", [graph.seqlens_k]), graph.constant(f"cache_row_{width}", [-1, width])]
        return graph.op("Reshape", [x, graph.op("Concat", shape, axis=0)])

    def _query_and_gate(self, graph: GraphBuilder, both: ir.Value, weight: str) -> tuple[ir.Value, ir.Value]:
        """Normalized queries and gates [batch, sequence, q_size] each; every head holds its query, then its gate."""
        heads = graph.op("Reshape", [both, graph.constant("gated_heads_shape", [0, 0, -1, 2 * self.head_dim])])
        query, gate = graph.ops("Split", [heads], 2, axis=-1, num_outputs=2)
        width = graph.constant(f"width_{self.q_size}", [0, 0, self.q_size])
        return graph.op("Reshape", [self.norm(graph, query, weight), width]), graph.op("Reshape", [gate, width])

    def _linear_attention(self, graph: GraphBuilder, prefix: str, index: int, x: ir.Value) -> ir.Value:
        formats = graph.weights.recipe.layer
        sources = [f"{prefix}in_proj_{part}.weight" for part in ("qkv", "z")]
        packed = graph.linear(x, f"{prefix}in_proj_qkvz", formats.qkv, sources)
        sizes = graph.constant("qkvz_sizes", [self.conv_channels, self.values_size])
        mixed, z = graph.ops("Split", [packed, sizes], 2, axis=-1)
        shape = [self.value_heads, self.key_dim, self.value_dim]
        past = graph.past_state("recurrent", index, shape)
        num_states = graph.op("Shape", [past], start=0, end=1)
        query, key, value = self._convolution(graph, prefix, index, _first_rows(graph, mixed, num_states))
        decay, beta = self._decay_and_beta(graph, prefix, x, num_states)
        y, present = graph.ops(
            "LinearAttention",
            [query, key, value, past, decay, beta],
            2,
            contrib=True,
            q_num_heads=self.key_heads,
            kv_num_heads=self.value_heads,
            update_rule="gated_delta",
        )
        graph.present_state(present, "recurrent", index, shape)
        y = _as_many_rows(graph, y, num_states, z)
        gated = graph.op("Mul", [self._value_norm(graph, y, f"{prefix}norm.weight"), graph.silu(z)])
        return graph.linear(gated, f"{prefix}out_proj", formats.out, [f"{prefix}out_proj.weight"])

    def _value_norm(self, graph: GraphBuilder, x: ir.Value, weight: str) -> ir.Value:
        """Normalize each head of ``x`` [batch, sequence, values_size] by itself."""
        # On CPU GatedRMSNorm, which is this and the gate, takes 4 times as long for a token, 20 times for a prompt.
        split = graph.op("Reshape", [x, graph.constant("value_heads_shape", [0, 0, -1, self.value_dim])])
        normed = graph.rms_norm(split, weight, self.rms_norm_eps)
        return graph.op("Reshape", [normed, graph.constant("values_shape", [0, 0, self.values_size])])

    def _convolution(
        self, graph: GraphBuilder, prefix: str, index: int, mixed: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries, keys (of length one) and values [batch, sequence, width], each mixed with the tokens before it."""
        shape = [self.conv_channels, self.conv_width - 1]
        past = graph.past_state("conv", index, shape)
        weight = graph.vector(f"{prefix}conv1d.weight", [f"{prefix}conv1d.weight"])
        # Channels first: with channels last the kernel is six times slower on prompts.
        channels_first = graph.op("Transpose", [mixed], perm=[0, 2, 1])
        y, present = graph.ops("CausalConvWithState", [channels_first, weight, None, past], 2, contrib=True)
        graph.present_state(present, "conv", index, shape)
        # Apart from the kernel, which halves its time for a prompt.
        y = graph.silu(y)
        sizes = graph.constant("conv_sizes", [2 * self.keys_size, self.values_size])
        both, value = graph.ops("Split", [graph.op("Transpose", [y], perm=[0, 2, 1]), sizes], 2, axis=-1)
        query, key = graph.ops("Split", [self._l2_norm(graph, both)], 2, axis=-1, num_outputs=2)
        return query, key, value

    def _l2_norm(self, graph: GraphBuilder, x: ir.Value) -> ir.Value:
        """Give each query and key of ``x`` [batch, sequence, 2 * keys_size] length one."""
        split = graph.op("Reshape", [x, graph.constant("l2_heads_shape", [0, 0, -1, self.key_dim])])
        # x / √(Σx² + ε) is RMS normalization with ε/n and all weights 1/√n.
        weight = graph.floats("l2_weight", np.full(self.key_dim, self.key_dim**-0.5, np.float32))
        epsilon = _L2_EPSILON / self.key_dim
        normed = graph.op("RMSNormalization", [split, weight], axis=-1, epsilon=epsilon)
        return graph.op("Reshape", [normed, graph.constant("l2_shape", [0, 0, 2 * self.keys_size])])

    def _decay_and_beta(
        self, graph: GraphBuilder, prefix: str, x: ir.Value, num_states: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Logarithm of what a head keeps of its state, and how far it takes in a new value [batch, sequence, heads]."""
        sources = [f"{prefix}in_proj_{part}.weight" for part in "ba"]
        packed = graph.linear(x, f"{prefix}in_proj_ba", graph.weights.recipe.layer.gates, sources)
        b, a = graph.ops("Split", [_first_rows(graph, packed, num_states)], 2, axis=-1, num_outputs=2)
        bias = graph.vector(f"{prefix}dt_bias", [f"{prefix}dt_bias"])
        scale = graph.vector(f"{prefix}decay_scale", [f"{prefix}A_log"], _minus_exp)
        decay, beta = graph.ops("LinearAttentionGate", [a, bias, scale, b], 2, contrib=True)
        return decay, beta

    def _check_linear_sizes(self) -> None:
        reason = ""
        if self.value_heads % self.key_heads:
            reason = f"{self.value_heads} value heads of linear attention are no multiple of {self.key_heads} key heads"
        elif self.conv_width < 2:
            reason = "linear_conv_kernel_dim is 1"
        elif self.rotary_dim % 16:
            reason = f"{self.rotary_dim} rotated of {self.head_dim} head dimensions are no multiple of 16"
        if reason:
            raise CheckpointError(f"this model cannot be exported: {reason}", hint="check config.json")


def _first_rows(graph: GraphBuilder, x: ir.Value, count: ir.Value) -> ir.Value:
    """The first ``count`` [1] of the rows of ``x``: those beyond only fill products up, and have no state."""
    return graph.op("Slice", [x, graph.constant("row_start", [0]), count, graph.constant("row_axis", [0])])


def _as_many_rows(graph: GraphBuilder, x: ir.Value, count: ir.Value, other: ir.Value) -> ir.Value:
    """``x``, which has ``count`` [1] rows, with rows of zeros up to as many as ``other`` has."""
    missing = graph.op("Sub", [graph.op("Shape", [other], start=0, end=1), count])
    ends = [graph.constant("pad_before", [0, 0, 0]), missing, graph.constant("pad_after", [0, 0])]
    return graph.op("Pad", [x, graph.op("Concat", ends, axis=0)])


def _attention_prefix(layer: int, kind: str) -> str:
    return f"{layer_prefix(layer)}{'self_attn' if kind == _FULL else 'linear_attn'}."


def _rotated_share(config: Mapping[str, Any]) -> float:
    value = rope_parameter(config, "partial_rotary_factor", _ROTATED_SHARE)
    return min(positive_number("partial_rotary_factor", value), 1.0)


def _layer_types(config: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    """Kind of each layer's attention; both kinds occur."""
    interval = positive_int(config, "full_attention_interval", 4)
    usual = [_LINEAR if (layer + 1) % interval else _FULL for layer in range(num_layers)]
    types = config.get("layer_types") or usual
    if not isinstance(types, list) or len(types) != num_layers or set(map(str, types)) != {_LINEAR, _FULL}:
        expected = f"{num_layers} times {_LINEAR} or {_FULL}, of both some"
        raise CheckpointError(f"config.json: layer_types are not {expected}", hint="check config.json")
    return tuple(types)


def _refuse_other_attention(config: Mapping[str, Any]) -> None:
    if config.get("attn_output_gate", True) is not True:
        raise CheckpointError("full attention without an output gate is not supported", hint=_HINT)
    if config.get("attention_bias"):
        raise CheckpointError("attention with biases is not supported", hint=_HINT)


def _minus_exp(a_log: Array) -> Array:
    return -np.exp(a_log)
