"""Calibration: a text runs through the graph while it is built, so that every matrix is rounded for what it will see.

Each product's inputs come out of the layers before it as they were quantized. Windows of the text go from one cut of
the graph to the next; the inputs of a product are computed from the last cut, window by window, and only their Hessian
stays. Beside them the same text goes through the layers in float32 (:mod:`export.reference`), so that every product
makes up, as far as it can, for what the ones before it have changed. So memory holds the hidden states of the text
twice, one part of a layer and one Hessian, whatever the model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.errors import ConfigError
from export.graph import GraphBuilder, Observe
from export.quantize.blockwise import QuantizedRows, quantize_rows
from export.quantize.gptq import Hessian, gptq_rows, solve
from export.quantize.recipes import Blockwise, Format
from export.reference import Lack, Original, Reference
from export.segments import Array, between, check_finite
from export.weights import Chunks, Rounding, to_nearest

BUILT_IN = "built-in"
"""Names the text that comes with this package."""
LEAST_TOKENS = 1024
WINDOW = 512
"""Tokens that see each other."""
_STRENGTH = np.float32(0.5)
"""Of what products lack, the part that is made up for: all of it costs right answers (docs/lab-notes.md)."""


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


@contextmanager
def observer(text: Sequence[int], original: Original, folder: Path) -> Iterator[Observe]:
    """What observes a graph while it is built, so that its weights are rounded for a text.

    Args:
        text: its tokens.
        original: what the graph is made of.
        folder: where its data file is written; takes one layer in float32 for a while.

    Raises:
        ConfigError: there are fewer than :data:`LEAST_TOKENS`.
    """
    if len(text) < LEAST_TOKENS:
        hint = f"at least {LEAST_TOKENS} are needed; some 10,000 are good"
        raise ConfigError(f"{len(text)} tokens are too few to calibrate with", hint=hint, param="calibrate")
    # Even, so that no window is short of context.
    count = -(-len(text) // min(WINDOW, original.context))
    windows = [window[None] for window in np.array_split(np.array(text, np.int64), count)]
    with TemporaryDirectory(dir=folder) as scratch:
        yield Calibration(folder, windows, Reference(original, Path(scratch), windows)).observe


class Calibration:
    """A text on its way through a graph under construction.

    Args:
        folder: where the graph's data file is written.
        windows: tokens of the text [1, tokens] each; a window's tokens see each other.
        reference: the same windows on their way through the original.
    """

    def __init__(self, folder: Path, windows: list[NDArray[Any]], reference: Reference) -> None:
        self._folder = folder
        self._windows = windows
        self._reference = reference
        self._at: ir.Value | None = None
        """The cut whose values the windows are."""

    def observe(self, graph: GraphBuilder, x: ir.Value, name: str, form: Format) -> Rounding:
        """How to round the matrix ``name`` in ``form`` that multiplies ``x``."""
        if not isinstance(form, Blockwise):
            return to_nearest
        graph.weights.file.flush()
        self._advance(graph)
        lack = self._reference.lack(name, str(graph.cuts[-1].name))
        # Errors of 8 bits are too small for others to make up for.
        is_fine = form.bits > 4
        if is_fine and lack is None:
            return to_nearest
        hessian = self._hessian(graph, x, name, lack)
        factor = hessian.factor(name)
        changes = None
        if lack is not None:
            values = solve(factor, hessian.cross)
            values *= _STRENGTH
            changes = _Changes(values, lack.is_of_inputs)
        return partial(_round, changes, quantize_rows if is_fine else partial(_gptq, factor))

    def _hessian(self, graph: GraphBuilder, x: ir.Value, name: str, lack: Lack | None) -> Hessian:
        """Of the inputs ``x`` of a product."""
        hessian: Hessian | None = None
        run = self._runner(graph, x)
        for number, window in enumerate(self._windows):
            inputs = run(window)[0]
            check_finite(inputs, f"in calibration, what goes into {name} is")
            hessian = hessian or Hessian(inputs.shape[-1], lack.width if lack else 0)
            hessian.add(inputs, lack.of(number, inputs) if lack else None)
        assert hessian is not None
        return hessian

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
        return between(graph.model("calibration"), self._folder, self._at or graph.input_ids, target)


@dataclass(frozen=True)
class _Changes:
    """What is added to weights before they are rounded."""

    values: Array
    """[columns, columns], to be multiplied by the weights; or [rows, columns]."""
    is_of_inputs: bool

    def of(self, weights: Array, start: int) -> Array:
        """For rows [n, columns] from ``start`` on."""
        return weights @ self.values if self.is_of_inputs else self.values[start : start + len(weights)]


def _round(
    changes: _Changes | None, rounding: Callable[[Array, Blockwise], QuantizedRows], chunks: Chunks, form: Blockwise
) -> Iterator[QuantizedRows]:
    start = 0
    for weights in chunks:
        yield rounding(weights if changes is None else weights + changes.of(weights, start), form)
        start += len(weights)


def _gptq(factor: Array, weights: Array, form: Blockwise) -> QuantizedRows:
    return gptq_rows(weights, factor, form)
