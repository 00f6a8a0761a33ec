"""From an open checkpoint to a graph with its data file: check, stream, quantize, save."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir
from tokenizers import Tokenizer

from edge.bundle import GRAPH, KVLayout
from edge.errors import ConfigError
from export.architectures import architecture_for
from export.architectures.decoder import Built, Decoder
from export.calibration import CalibrationText, observer
from export.checkpoint import Checkpoint
from export.graph import GraphBuilder, Observe
from export.lora import LoraPlaces
from export.progress import Progress, step
from export.quantize.recipes import Float32, Recipe, row_multiple
from export.reference import Original
from export.weights import DataFile, Weights

DEFAULT_CONTEXT: Final = 32768
"""Tokens: no small device has the cache for more."""


@dataclass(frozen=True)
class Kept:
    """Matrices of the layers, which a quantized checkpoint has as integers."""

    method: str
    matrices: int
    """Kept as stored."""
    requantized: int
    """Of a kind that kernels do not take: their values were quantized by the recipe."""

    def note(self) -> str:
        """What the user should know about it."""
        if not self.matrices + self.requantized:
            return f"the weights are floats of {self.method}: all follow the recipe"
        others = f"; {self.requantized} that no kernel takes follow the recipe" if self.requantized else ""
        return (
            f"{self.matrices} matrices of the layers keep the integers of {self.method}, "
            f"embedding and head follow the recipe{others}"
        )


@dataclass(frozen=True)
class Graph:
    """A graph that was built, with its data file beside it."""

    model: ir.Model
    architecture: Decoder
    recipe: Recipe
    """As it was fitted to the model."""
    built: Built
    context_length: int
    """Tokens it has rotary tables for."""
    kv: KVLayout
    parameter_count: int
    weight_bytes_per_token: int
    row_multiple: int
    kept: Kept | None
    """What was kept of a checkpoint that is quantized already."""


def build_graph(
    checkpoint: Checkpoint,
    folder: Path,
    recipe: Recipe,
    *,
    progress: Progress,
    context: int | None = None,
    lora: bool = False,
    calibration: CalibrationText | None = None,
) -> Graph:
    """Check the checkpoint, stream its weights into ``folder`` and save the graph there.

    Args:
        checkpoint: the open source.
        folder: where graph and weights go.
        recipe: number formats.
        progress: receives the one phase.
        context: tokens of context; None = the checkpoint's, at most :data:`DEFAULT_CONTEXT`.
        lora: whether the graph gets places for LoRA adapters.
        calibration: what the rounding of the weights is fitted to; None = each weight to nearest.

    Raises:
        CheckpointError: tensors are missing, left over, misshapen or unreadable; the config is unsupported.
        ConfigError: ``context`` is out of range.
        OSError: the disk refused; see :func:`export.staging.disk_errors`.
    """
    architecture = architecture_for(checkpoint.config)
    architecture.check({name: info.shape for name, info in checkpoint.tensors.items()})
    length = _context(context, architecture)
    recipe = recipe.fitted(architecture.hidden_size, is_calibrated=calibration is not None)
    with (
        step(progress, f"{recipe.name} weights", architecture.parameter_count()) as advance,
        DataFile(folder) as file,
        _observer(calibration, Original(checkpoint, architecture, recipe, length), folder) as observe,
    ):
        weights = Weights(checkpoint, recipe, file, advance)
        builder = GraphBuilder(weights, LoraPlaces().adapt if lora else None, observe)
        built = architecture.build(builder, length)
        model = builder.model(architecture.model_type)
    assert weights.parameter_count == architecture.parameter_count()
    ir.save(model, folder / GRAPH)
    kept = None
    if checkpoint.quantized and not isinstance(recipe.layer.qkv, Float32):
        kept = Kept(checkpoint.quantized, len(weights.kept), len(weights.requantized))
    return Graph(
        model=model,
        architecture=architecture,
        recipe=recipe,
        built=built,
        context_length=length,
        kv=architecture.kv_layout(),
        parameter_count=weights.parameter_count,
        weight_bytes_per_token=built.bytes_per_token,
        row_multiple=max(recipe.row_multiple, row_multiple(weights.kept.values())),
        kept=kept,
    )


def _observer(text: CalibrationText | None, original: Original, folder: Path) -> AbstractContextManager[Observe | None]:
    """What the rounding is chosen by."""
    return nullcontext() if text is None else observer(token_ids(original.checkpoint, text), original, folder)


def token_ids(checkpoint: Checkpoint, calibration: CalibrationText) -> list[int]:
    """A text as the checkpoint's tokenizer cuts it."""
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json().decode())
    ids: list[int] = tokenizer.encode(calibration.text, add_special_tokens=False).ids
    return ids


def _context(wanted: int | None, architecture: Decoder) -> int:
    most = architecture.max_positions
    if wanted is None:
        return min(most, DEFAULT_CONTEXT)
    if not 0 < wanted <= most:
        raise ConfigError(f"--context {wanted} is out of range", hint=f"this model has 1 to {most} positions")
    return wanted
