"""Qwen2 and Qwen2.5 (``model_type`` qwen2): grouped-query attention with biases on query, key and value."""

from __future__ import annotations

import onnx_ir as ir

from export.architectures.decoder import Decoder, Shapes, layer_prefix
from export.graph import GraphBuilder


class Qwen2(Decoder):
    """Yang et al. 2024, https://arxiv.org/abs/2412.15115."""

    def attention_tensors(self, layer: int) -> Shapes:
        """Seven tensors: weights and biases of query, key and value, and the output projection."""
        prefix = f"{layer_prefix(layer)}self_attn."
        return {
            f"{prefix}q_proj.weight": (self.q_size, self.hidden_size),
            f"{prefix}q_proj.bias": (self.q_size,),
            f"{prefix}k_proj.weight": (self.kv_size, self.hidden_size),
            f"{prefix}k_proj.bias": (self.kv_size,),
            f"{prefix}v_proj.weight": (self.kv_size, self.hidden_size),
            f"{prefix}v_proj.bias": (self.kv_size,),
            f"{prefix}o_proj.weight": (self.hidden_size, self.q_size),
        }

    def attention(self, graph: GraphBuilder, layer: int, x: ir.Value, rotary: tuple[ir.Value, ir.Value]) -> ir.Value:
        """Attention with query, key and value from one product."""
        prefix = f"{layer_prefix(layer)}self_attn."
        qkv = self.qkv(graph, prefix, x, has_bias=True)
        heads = {"num_heads": self.num_heads, "kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        attended = graph.attention(layer, (qkv, None, None), rotary, **heads)
        return graph.linear(attended, f"{prefix}o_proj", graph.weights.recipe.layer.out, [f"{prefix}o_proj.weight"])
