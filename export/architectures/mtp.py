"""Multi-token prediction of Qwen3.5: one more layer, which guesses the token after the next one, as a graph of its own.

At position i stands what the model made of token i, beside token i + 1, which is known by then:

    x = fc([norm(embedding of token i + 1), norm(hidden state i)])
    x = x + attention(norm(x)); x = x + mlp(norm(x))        full attention with a cache of its own
    logits of token i + 2 = the model's own head of norm(x)

The hidden state is the one that the model's head takes, after the final norm: so vLLM [1] feeds it, and llama.cpp since
it found that fewer guesses hold with the one before the norm [2]. The head's own hidden state, which is normalized too,
takes its place at the next position, to guess further.

[1] https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/qwen3_5_mtp.py
[2] https://github.com/ggml-org/llama.cpp/pull/24025
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import onnx_ir as ir

from edge.bundle import KVLayout
from edge.errors import CheckpointError
from export.architectures.decoder import Built, Shapes, compare_tensors, positive_int
from export.architectures.qwen3_5 import MTP_PREFIX, Qwen3_5
from export.graph import HIDDEN, HIDDEN_STATES, MIDDLE, GraphBuilder

DRAFT_HIDDEN_STATES: Final = "draft_hidden_states"
"""Output: what takes the place of :data:`export.graph.HIDDEN_STATES` at the next position [batch, sequence, hidden]."""
_LAYER = f"{MTP_PREFIX}layers.0."


class MultiTokenPrediction:
    """The head of a model: what a checkpoint must hold of it, and the graph it becomes.

    Args:
        model: the architecture it belongs to.
        config: config.json.

    Raises:
        CheckpointError: it has several layers, or tables of its own.
    """

    def __init__(self, model: Qwen3_5, config: Mapping[str, Any]) -> None:
        self._model = model
        hint = "export it without --mtp"
        if (layers := positive_int(config, "mtp_num_hidden_layers", 1)) != 1:
            raise CheckpointError(f"multi-token prediction with {layers} layers is not supported", hint=hint)
        if config.get("mtp_use_dedicated_embeddings"):
            raise CheckpointError("multi-token prediction with embeddings of its own is not supported", hint=hint)

    def tensors(self) -> Shapes:
        """Every tensor of the head; embedding and output table are the model's."""
        hidden = self._model.hidden_size
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        return {
            f"{MTP_PREFIX}fc.weight": (hidden, 2 * hidden),
            **{f"{MTP_PREFIX}{name}.weight": (hidden,) for name in norms},
            **self._model.full_attention_tensors(f"{_LAYER}self_attn."),
            **self._model.mlp_tensors(_LAYER),
        }

    def parameter_count(self) -> int:
        """Parameters of the head alone."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def check(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Compare a checkpoint's tensors of the head with :meth:`tensors`.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape; names them.
        """
        head = {name: shape for name, shape in found.items() if name.startswith(MTP_PREFIX)}
        compare_tensors(self.tensors(), head, "is its multi-token prediction of another kind? export it without --mtp")

    def kv_layout(self) -> KVLayout:
        """Shape of its cache: of one layer."""
        return self._model.kv_layout().model_copy(update={"layers": 1})

    def build(self, graph: GraphBuilder, main: Built, context_length: int) -> int:
        """Add the head to ``graph``, an empty one, with rotary tables for ``context_length`` positions.

        Args:
            graph: the head's own; its weights come from the checkpoint of the model.
            main: what became of the model, whose tables are read in their place.
            context_length: of the model.

        Returns:
            Bytes of weights that one guess reads.
        """
        model, recipe = self._model, graph.weights.recipe
        shape: list[int | str] = ["batch", "sequence", model.hidden_size]
        hidden = graph.input(HIDDEN_STATES, ir.DataType.FLOAT, shape)
        rotary = model.rotary(graph, context_length)
        embedded = graph.rows(graph.input_ids, main.embedding)
        parts = [
            model.norm(graph, embedded, f"{MTP_PREFIX}pre_fc_norm_embedding.weight"),
            model.norm(graph, hidden, f"{MTP_PREFIX}pre_fc_norm_hidden.weight"),
        ]
        both = graph.op("Concat", parts, axis=-1)
        x = graph.linear(both, f"{MTP_PREFIX}fc", recipe.layer.out, [f"{MTP_PREFIX}fc.weight"])
        x = graph.cut(x, f"{HIDDEN}.0", shape)
        normed = model.norm(graph, x, f"{_LAYER}input_layernorm.weight")
        x = graph.op("Add", [x, model.full_attention(graph, f"{_LAYER}self_attn.", 0, normed, rotary)])
        x = graph.cut(x, f"{MIDDLE}.0", shape)
        x = graph.op("Add", [x, model.mlp(graph, _LAYER, x, recipe.layer.down)])
        x = model.norm(graph, graph.cut(x, f"{HIDDEN}.1", shape), f"{MTP_PREFIX}norm.weight")
        graph.output(x, DRAFT_HIDDEN_STATES, ir.DataType.FLOAT, shape)
        return graph.matrix_bytes + model.head(graph, x, main.head)
