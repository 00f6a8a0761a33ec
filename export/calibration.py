"""Calibration: a text runs through the graph while it is built, so that every matrix is rounded for what it will see.

Each product's inputs come out of the layers before it as they were quantized. Windows of the text go from one cut of
the graph to the next; the inputs of a product are computed from the last cut, window by window, and only their Hessian
stays. So memory holds the hidden states of the text, one part of a layer and one Hessian, whatever the model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.errors import ConfigError
from export.graph import GraphBuilder
from export.quantize.blockwise import QuantizedRows, quantize_rows
from export.quantize.gptq import Hessian, gptq_rows
from export.quantize.recipes import Blockwise, Format
from export.segments import Array, Segment, check_finite, empty, lengths, needed_inputs
from export.weights import Rounding

BUILT_IN = "built-in"
"""Names the text that comes with this package."""
LEAST_TOKENS = 1024
WINDOW = 512
"""Tokens that see each other."""


@dataclass(frozen=True)
class CalibrationText:
    """A text that shows a model what it will read."""

    name: str
    """:data:`BUILT_IN`, or the file's name."""
    text: str

    @classmethod
    def open(cls, what: str) -> CalibrationText:
        """The text named :data:`BUILT_IN`, or a UTF-8 file.

        Raises:
            ConfigError: the file cannot be read, or holds something else.
        """
        if what == BUILT_IN:
            return cls(what, files("export").joinpath("calibration.txt").read_text(encoding="utf-8"))
        try:
            return cls(Path(what).name, Path(what).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
            hint = f"give a text file, or {BUILT_IN}"
            raise ConfigError(f"cannot calibrate with {what}: {reason}", hint=hint, param="calibrate") from None

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {"method": "gptq", "text": self.name, "sha256": sha256(self.text.encode()).hexdigest()}


class Calibration:
    """A text on its way through a graph under construction.

    Args:
        folder: where the graph's data file is written.
        ids: tokens of the text.
        context: positions that the graph has.

    Raises:
        ConfigError: there are fewer than :data:`LEAST_TOKENS`.
    """

    def __init__(self, folder: Path, ids: Sequence[int], context: int) -> None:
        if len(ids) < LEAST_TOKENS:
            hint = f"at least {LEAST_TOKENS} are needed; some 10,000 are good"
            raise ConfigError(f"{len(ids)} tokens are too few to calibrate with", hint=hint, param="calibrate")
        self._folder = folder
        # Even, so that no window is short of context.
        count = -(-len(ids) // min(WINDOW, context))
        self._windows: list[NDArray[Any]] = [window[None] for window in np.array_split(np.array(ids, np.int64), count)]
        self._at: ir.Value | None = None
        """The cut whose values the windows are."""

    def observe(self, graph: GraphBuilder, x: ir.Value, name: str, form: Format) -> Rounding:
        """How to round the matrix ``name`` in ``form`` that multiplies ``x``."""
        if not isinstance(form, Blockwise) or form.bits > 4:
            # Errors of 8 bits are too small for others to make up for.
            return quantize_rows
        graph.weights.file.flush()
        self._advance(graph)
        run = self._runner(graph, x)
        hessian: Hessian | None = None
        for window in self._windows:
            inputs = run(window)
            check_finite(inputs, f"in calibration, what goes into {name} is")
            hessian = hessian or Hessian(inputs.shape[-1])
            hessian.add(inputs[0])
        assert hessian is not None
        return partial(_round, hessian.factor(name))

    def _advance(self, graph: GraphBuilder) -> None:
        """Bring the windows to the last cut of the graph."""
        if self._at is not graph.cuts[-1]:
            run = self._runner(graph, graph.cuts[-1])
            # One at a time, for only one copy of them.
            for number, window in enumerate(self._windows):
                self._windows[number] = run(window)
            self._at = graph.cuts[-1]

    def _runner(self, graph: GraphBuilder, target: ir.Value) -> Callable[[NDArray[Any]], Array]:
        """Computes ``target`` [1, tokens, columns] from where the windows are."""
        source = self._at or graph.input_ids
        target.type = ir.TensorType(ir.DataType.FLOAT)
        nothing = {str(value.name): empty(value) for value in needed_inputs(target, source)}
        segment = Segment(
            graph.model("calibration"),
            self._folder,
            [str(source.name), *nothing],
            [str(target.name)],
        )

        def run(window: NDArray[Any]) -> Array:
            known = lengths(0, window.shape[1])
            inputs = {name: known.get(name, value) for name, value in nothing.items()}
            y: Array = segment.run({str(source.name): window, **inputs})[0]
            return y

        return run


def _round(factor: Array, weights: Array, form: Blockwise) -> QuantizedRows:
    return gptq_rows(weights, factor, form)
