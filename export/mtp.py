"""The head of multi-token prediction beside the model's graph (``--mtp``): chosen, built, described.

Its graph has a data file of its own, and reads the tables in that of the model. So the model's own files are the same
bytes with and without it, and a runtime that knows no such head has no byte of it in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from edge.bundle import KVLayout
from edge.errors import ConfigError
from export.architectures import architecture_for
from export.architectures.mtp import MultiTokenPrediction
from export.architectures.qwen3_5 import MTP_PREFIX, Qwen3_5
from export.build import Graph
from export.checkpoint import Checkpoint
from export.graph import HIDDEN, HIDDEN_STATES, GraphBuilder
from export.progress import Progress, step
from export.report import Windows
from export.segments import Layer, Segment, final_hidden, normalized
from export.verify import head_logits
from export.weights import DataFile, Weights

MTP_GRAPH: Final = "mtp.onnx"
MTP_WEIGHTS: Final = "mtp.onnx.data"


@dataclass(frozen=True)
class MtpGraph:
    """A head that was built, with its data file beside it."""

    model: ir.Model
    kv: KVLayout
    parameter_count: int
    """Of the head alone."""
    weight_bytes_per_token: int
    """Bytes of weights that one guess reads, of the model's table too."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "kv": self.kv.model_dump(),
            "parameter_count": self.parameter_count,
            "weight_bytes_per_token": self.weight_bytes_per_token,
        }


def multi_token_prediction(checkpoint: Checkpoint) -> MultiTokenPrediction:
    """The head of a checkpoint.

    Raises:
        CheckpointError: it is of an unsupported kind, or its tensors are not those of the config.
        ConfigError: the checkpoint has none.
    """
    architecture = architecture_for(checkpoint.config)
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    if not isinstance(architecture, Qwen3_5) or not _count(found):
        what = "this checkpoint holds none" if isinstance(architecture, Qwen3_5) else "only Qwen3.5 has one here"
        hint = "export it without --mtp"
        raise ConfigError(f"--mtp keeps a head of multi-token prediction: {what}", hint=hint, param="mtp")
    head = MultiTokenPrediction(architecture, checkpoint.config)
    head.check(found)
    return head


def skipped_mtp(checkpoint: Checkpoint) -> list[str]:
    """A note on the head that an export without it leaves out."""
    if not isinstance(architecture_for(checkpoint.config), Qwen3_5) or not (count := _count(checkpoint.tensors)):
        return []
    return [f"{count} tensors of multi-token prediction are skipped: --mtp keeps them"]


def build_mtp(
    head: MultiTokenPrediction,
    graph: Graph,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    progress: Progress,
) -> MtpGraph:
    """Stream the head's weights into ``folder`` and save its graph there.

    Args:
        head: what to build.
        graph: of the model, with its data file in ``folder``; the head has the formats of its layers, to nearest.
        checkpoint: the open source.
        folder: where graph and weights go.
        progress: receives the one phase.

    Raises:
        CheckpointError: tensors are unreadable.
        ExportError: they hold NaN or infinity.
        OSError: the disk refused; see :func:`export.staging.disk_errors`.
    """
    with (
        step(progress, "multi-token prediction", head.parameter_count()) as advance,
        DataFile(folder, MTP_WEIGHTS) as file,
    ):
        weights = Weights(checkpoint, graph.recipe, file, advance)
        builder = GraphBuilder(weights)
        bytes_per_token = head.build(builder, graph.built, graph.context_length)
        model = builder.model("mtp")
    assert weights.parameter_count == head.parameter_count()
    ir.save(model, folder / MTP_GRAPH)
    return MtpGraph(model, head.kv_layout(), weights.parameter_count, bytes_per_token)


def share_right(head: ir.Model, main: ir.Model, folder: Path, windows: Windows) -> float:
    """How often the head's first choice is the model's own, at the scored places of the windows but the last.

    Args:
        head: its graph.
        main: that of the model.
        folder: where both lie.
        windows: what both read, the head a token less.

    Raises:
        ExportError: onnxruntime refuses a graph, or an output is not finite.
    """
    length = windows.ids.shape[1]
    first = Segment(head, folder, ["input_ids", HIDDEN_STATES], [f"{HIDDEN}.0"])
    layer = Layer(head, folder, 0)
    right = []
    for ids, x in zip(windows.ids, windows.last_layer(main, folder), strict=True):
        chosen = head_logits(main, folder, final_hidden(main, folder, x, range(length // 2, length - 1)))
        layer.clear()
        y = layer.append(first.run({"input_ids": ids[None, 1:], HIDDEN_STATES: normalized(main, folder, x)[:, :-1]})[0])
        # The head has the token that the model reads next: from one place before, it guesses the same token.
        guessed = head_logits(head, folder, final_hidden(head, folder, y, range(length // 2 - 1, length - 2)))
        right.append(chosen.argmax(axis=1) == guessed.argmax(axis=1))
    return float(np.mean(right))


def _count(tensors: Mapping[str, object]) -> int:
    return sum(name.startswith(MTP_PREFIX) for name in tensors)
