"""Qwen3 (``model_type`` qwen3): no biases, RMS norms on each query and key head, a head dimension of its own."""

from __future__ import annotations

import onnx_ir as ir

from export.architectures.decoder import Decoder, Shapes, layer_prefix
from export.graph import GraphBuilder


class Qwen3(Decoder):
    """Yang et al. 2025, https://arxiv.org/abs/2505.09388."""

    def attention_tensors(self, layer: int) -> Shapes:
        """Six tensors: four projections and the two head norms."""
        prefix = f"{layer_prefix(layer)}self_attn."
        return {
            f"{prefix}q_proj.weight": (self.q_size, self.hidden_size),
            f"{prefix}k_proj.weight": (self.kv_size, self.hidden_size),
            f"{prefix}v_proj.weight": (self.kv_size, self.hidden_size),
            f"{prefix}o_proj.weight": (self.hidden_size, self.q_size),
            f"{prefix}q_norm.weight": (self.head_dim,),
            f"{prefix}k_norm.weight": (self.head_dim,),
        }

    def attention(self, graph: GraphBuilder, layer: int, x: ir.Value, rotary: tuple[ir.Value, ir.Value]) -> ir.Value:
        """Attention with query, key and value from one product."""
        prefix = f"{layer_prefix(layer)}self_attn."
        packed = self.qkv(graph, prefix, x)
        sizes = graph.constant("qkv_sizes", [self.q_size, self.kv_size, self.kv_size])
        query, key, value = graph.ops("Split", [packed, sizes], 3, axis=-1)
        # GroupQueryAttention takes the norms itself on CUDA only; on CPU they stand before it.
        query = self.head_norm(graph, query, f"{prefix}q_norm.weight", self.q_size)
        key = self.head_norm(graph, key, f"{prefix}k_norm.weight", self.kv_size)
        heads = {"num_heads": self.num_heads, "kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        attended = graph.attention(layer, (query, key, value), rotary, **heads)
        return graph.linear(attended, f"{prefix}o_proj", graph.weights.recipe.layer.out, [f"{prefix}o_proj.weight"])
