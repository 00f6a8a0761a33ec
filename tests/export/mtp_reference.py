"""Multi-token prediction of Qwen3.5 in NumPy, in float64, written from vLLM's model of it, line by line.

https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/qwen3_5_mtp.py
(Qwen3_5MultiTokenPredictor.forward; its layer: Qwen3_5DecoderLayer of qwen3_5.py and Qwen3NextAttention of
qwen3_next.py, with attn_output_gate, GemmaRMSNorm, and rotary embedding of a part of each head)

reference = Reference(config, tiny.random_tensors(config))
logits, hidden = reference.run(ids, hidden_states)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Reference:
    """The head of a checkpoint with this config and these tensors."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> None:
        self._text = config.get("text_config", config)
        self._tensors = {name.replace("model.language_model.", "model."): each for name, each in tensors.items()}

    def run(self, ids: NDArray[np.int64], hidden: NDArray[Any]) -> tuple[Array, Array]:
        """All of a sequence at once.

        Args:
            ids: the token behind each position [tokens].
            hidden: hidden state of each position [tokens, hidden].

        Returns:
            Logits [tokens, padded_vocab] and hidden states [tokens, hidden].
        """
        table = self._tensor("model.embed_tokens")
        embedded = self._norm(table[ids], "mtp.pre_fc_norm_embedding")
        x = np.concatenate([embedded, self._norm(hidden.astype(np.float64), "mtp.pre_fc_norm_hidden")], axis=-1)
        residual = x @ self._tensor("mtp.fc").T
        x = self._attention(self._norm(residual, "mtp.layers.0.input_layernorm"))
        residual = residual + x
        x = self._mlp(self._norm(residual, "mtp.layers.0.post_attention_layernorm"))
        x = self._norm(residual + x, "mtp.norm")
        head = table if self._text["tie_word_embeddings"] else self._tensor("lm_head")
        return x @ head.T, x

    def _attention(self, x: Array) -> Array:
        text, tokens = self._text, len(x)
        heads, kv_heads, width = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
        q_gate = (x @ self._layer("self_attn.q_proj").T).reshape(tokens, heads, 2 * width)
        q, gate = np.split(q_gate, 2, axis=-1)
        k = (x @ self._layer("self_attn.k_proj").T).reshape(tokens, kv_heads, width)
        v = (x @ self._layer("self_attn.v_proj").T).reshape(tokens, kv_heads, width)
        q = self._rotate(self._norm(q, "mtp.layers.0.self_attn.q_norm"))
        k = self._rotate(self._norm(k, "mtp.layers.0.self_attn.k_norm"))
        k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * width**-0.5
        scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v)
        return (attended * _sigmoid(gate)).reshape(tokens, -1) @ self._layer("self_attn.o_proj").T

    def _mlp(self, x: Array) -> Array:
        gate, up = x @ self._layer("mlp.gate_proj").T, x @ self._layer("mlp.up_proj").T
        return (gate * _sigmoid(gate) * up) @ self._layer("mlp.down_proj").T

    def _rotate(self, x: Array) -> Array:
        """Neox style, over the first part of each head; position i for what stands at place i."""
        rope = self._text["rope_parameters"]
        width = int(self._text["head_dim"] * rope["partial_rotary_factor"])
        inverse = 1.0 / rope["rope_theta"] ** (np.arange(0, width, 2) / width)
        angles = np.arange(len(x))[:, None, None] * inverse
        first, second, rest = np.split(x, [width // 2, width], axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    def _norm(self, x: Array, name: str) -> Array:
        """GemmaRMSNorm: times 1 + weight."""
        variance = np.square(x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(variance + self._text["rms_norm_eps"]) * (1.0 + self._tensor(name))

    def _layer(self, name: str) -> Array:
        return self._tensor(f"mtp.layers.0.{name}")

    def _tensor(self, name: str) -> Array:
        return self._tensors[f"{name}.weight"].astype(np.float64)


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))
