"""The original beside a graph that is being calibrated: what would go into each of its products.

The checkpoint's layers are built in float32, one at a time, into a file that the next one replaces; so this takes the
disk and the memory of one layer. The same windows of a text that go through the graph go through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.architectures.decoder import EMBEDDING, Decoder
from export.checkpoint import Checkpoint
from export.graph import HIDDEN, GraphBuilder, Observe
from export.quantize.recipes import Float32, Format, Recipe, recipe_named
from export.segments import Array, between
from export.weights import DataFile, Rounding, Weights, to_nearest

_FILE: Final = "layer.data"


@dataclass(frozen=True)
class Lack:
    """What a product in the graph lacks of the original's, for windows of the text."""

    width: int
    """Of :attr:`of`."""
    is_of_inputs: bool
    """Whether it is told by the inputs, or by what the original's weights make of them: whatever is less."""
    of: Callable[[int, Array], Array]
    """From the number of a window and the inputs [tokens, columns] that it has now: [tokens, width]."""


@dataclass(frozen=True)
class Original:
    """A model in float32, cut into the products of a recipe."""

    checkpoint: Checkpoint
    """The open source."""
    architecture: Decoder
    recipe: Recipe
    context: int
    """Positions that there are rotary tables for."""

    def layer(self, index: int, file: DataFile, observe: Observe) -> GraphBuilder:
        """A graph of one layer, from ``hidden.{index}`` to the next.

        Raises:
            ExportError: the checkpoint holds NaN or infinity.
        """
        exact = recipe_named("fp32")
        # Its values are a product of their own, where the recipe's are.
        value = Float32() if self.recipe.layer.splits_values else None
        exact = replace(exact, layer=replace(exact.layer, value=value))
        graph = GraphBuilder(Weights(self.checkpoint, exact, file, lambda _: None), observe=observe)
        name, shape = f"{HIDDEN}.{index}", self.architecture.hidden_shape
        x = graph.cut(graph.input(name, ir.DataType.FLOAT, shape), name, shape)
        self.architecture.layer(graph, index, x, self.architecture.rotary(graph, self.context))
        return graph

    def embed(self, ids: NDArray[np.int64]) -> Array:
        """Embeddings [1, tokens, hidden] of tokens [1, tokens]."""
        unique, places = np.unique(ids, return_inverse=True)
        rows = [self.checkpoint.rows(EMBEDDING, int(number), int(number) + 1) for number in unique]
        return np.concatenate(rows)[places].reshape(*ids.shape, -1)


class Reference:
    """Windows of a text on their way through the original's layers.

    Args:
        original: the model.
        folder: for one layer's weights.
        windows: tokens of the text [1, tokens] each.
    """

    def __init__(self, original: Original, folder: Path, windows: Sequence[NDArray[np.int64]]) -> None:
        self._original = original
        self._folder = folder
        self._windows = [original.embed(window) for window in windows]
        self._layer = -1
        self._at: ir.Value
        self._ahead: list[ir.Value] = []
        """Cuts of the layer that the windows have not come to."""

    def lack(self, name: str, cut: str) -> Lack | None:
        """What the product ``name`` lacks, computed from the cut before it; None where no layer has such a product.

        Raises:
            ExportError: onnxruntime refuses the layer, or the checkpoint holds NaN or infinity.
        """
        self._advance(cut)
        if name not in self._inputs:
            return None
        model, inputs = self._graph.model("reference"), self._inputs[name]
        run = between(model, self._folder, self._at, inputs)
        product = next(use.node for use in inputs.uses() if (use.node.inputs[1] or inputs).name == name)
        rows, columns = cast("ir.ExternalTensor", cast("ir.Value", product.inputs[1]).const_value).shape.numpy()
        if columns <= rows:
            return Lack(columns, is_of_inputs=True, of=lambda number, x: run(self._windows[number])[0] - x)
        multiply = between(model, self._folder, inputs, product.outputs[0])
        return Lack(rows, is_of_inputs=False, of=lambda number, x: multiply(run(self._windows[number]) - x)[0])

    def _advance(self, cut: str) -> None:
        """Bring the windows to a cut of the graph; where that is the end of a layer, into the one that follows."""
        while True:
            if not self._ahead and self._layer + 1 < self._original.architecture.num_layers:
                self._open(self._layer + 1)
            if self._at.name == cut:
                return
            target = self._ahead.pop(0)
            run = between(self._graph.model("reference"), self._folder, self._at, target)
            for number, window in enumerate(self._windows):
                self._windows[number] = run(window)
            self._at = target

    def _open(self, layer: int) -> None:
        self._layer = layer
        # Removed first: what is loaded of the layer before may still be mapped.
        (self._folder / _FILE).unlink(missing_ok=True)
        self._inputs: dict[str, ir.Value] = {}
        with DataFile(self._folder, _FILE) as file:
            self._graph = self._original.layer(layer, file, self._note)
        self._at, *self._ahead = self._graph.cuts

    def _note(self, graph: GraphBuilder, x: ir.Value, name: str, form: Format) -> Rounding:
        """Remember the inputs of a product."""
        del graph, form
        self._inputs[name] = x
        return to_nearest
