"""The onnxruntime session of a bundle; only this file and ``edge.engine.device`` import onnxruntime.

Steps are bound by pointer to memory that numpy owns: inputs are changed in place, the cache is written in place (past
and present share their buffers), logits are read in place. A step copies nothing and allocates nothing in Python.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.bundle import GRAPH, WEIGHTS
from edge.bundle.rotary import POSITIONS, rotary_positions
from edge.engine.heap import huge_heap
from edge.engine.huge_pages import collapse_resident
from edge.engine.kv_cache import Cache
from edge.engine.mapped_pages import MappedPages
from edge.errors import BundleError

Inputs = dict[str, NDArray[Any]]
"""Arrays by the graph's input names."""
Outputs = dict[str, NDArray[np.float32]]
"""Arrays by the graph's output names."""
log = logging.getLogger(__name__)

ERRORS_ONLY = 3
"""Severity of onnxruntime's log."""
_PACKED_PER_BYTE = 1.25
"""Most bytes that the packed copies of the weights take for each byte of the bundle."""


class Session:
    """A loaded model.

    Args:
        bundle: the bundle's folder; the caller has verified it.
        threads: threads of a step.
        spin_us: microseconds that idle threads spin for the next kernel before they sleep; 0 = never.
        context: most tokens of a sequence; None = as many as the graph takes.

    Raises:
        BundleError: onnxruntime refuses the graph.
    """

    def __init__(self, bundle: Path, *, threads: int, spin_us: int, context: int | None = None) -> None:
        self._mapped = MappedPages(bundle / WEIGHTS)
        options = _options(threads, spin_us)
        if context is not None:
            shorten_rotary_tables(options, bundle / GRAPH, context)
        self._session = self._load(bundle, options)
        self._mapped.note()
        self.drop_mapped()

    def drop_mapped(self) -> None:
        """Let the pages of the weights' file go that steps have read since; what is packed is no part of them."""
        self._mapped.drop()

    def input_shapes(self) -> dict[str, list[int | str]]:
        """Shapes of the graph's inputs by name; free dimensions are names."""
        return {value.name: list(value.shape) for value in self._session.get_inputs()}

    def step(self, inputs: Inputs, outputs: Outputs, caches: Sequence[tuple[Any, Any]]) -> Step:
        """Bind a step to its arrays, which must keep their place as long as it.

        Args:
            inputs: what is not the cache.
            outputs: what is not the cache, as far as it is wanted.
            caches: keys and values of each layer [rows, kv_heads, context, head_dim], as :meth:`Step.bind_cache` takes
                them.
        """
        step = self._new_step()
        for name, array in inputs.items():
            step.bind_input(name, array)
        for layer, (keys, values) in enumerate(caches):
            step.bind_cache(f"{layer}.key", keys)
            step.bind_cache(f"{layer}.value", values)
        for name, output in outputs.items():
            step.bind_output(name, output)
        return step

    def _load(self, bundle: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        size = sum(path.stat().st_size for path in bundle.iterdir())
        with huge_heap(int(size * _PACKED_PER_BYTE)) as huge:
            session = _open(bundle / GRAPH, options)
        if not huge:
            joined = collapse_resident()
            log.debug("%d MiB of weights on huge pages", joined >> 20)
        return session

    def _new_step(self) -> Step:
        return Step(self._session)


def _open(graph: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(os.fspath(graph), options, ["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime has one class per status and no common base
        first = str(error).partition("\n")[0]
        raise BundleError(f"onnxruntime cannot load {graph}: {first}", hint="export it again") from None


class Step:
    """One run of the graph with everything bound."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()

    def bind_input(self, name: str, array: NDArray[np.generic]) -> None:
        """Bind an input to an array's memory, in place of what was bound before."""
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def bind_output(self, name: str, array: NDArray[np.generic]) -> None:
        """Bind an output to an array's memory, in place of what was bound before."""
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def bind_cache(self, name: str, array: Cache) -> None:
        """Bind a past input and its present output to the same memory."""
        self.bind_input(f"past_key_values.{name}", array)
        self.bind_output(f"present.{name}", array)

    def run(self) -> None:
        """Run the graph."""
        self._session.run_with_iobinding(self._binding)


def _options(threads: int, spin_us: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads
    # Shapes change with every prompt: a planned memory pattern would never fit twice.
    options.enable_mem_pattern = False
    # The arena never shrinks: without it a step's memory goes back, 32 MB here, and nothing gets slower.
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin_us else "0")
    if spin_us:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
    # Denormals cost hundreds of cycles each and mean nothing in activations.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def shorten_rotary_tables(options: ort.SessionOptions, graph: Path, context: int) -> None:
    """Let the tables that onnxruntime computes be as long as they need to be: they take 8 MB for 32,768 tokens."""
    with suppress(OSError):  # which is for loading to say
        # onnxruntime refuses names that are not there, and the first bundles hold the tables themselves.
        if POSITIONS.encode() in graph.read_bytes():
            positions = ort.OrtValue.ortvalue_from_numpy(np.array(rotary_positions(context), np.int64))
            options.add_external_initializers([POSITIONS], [positions])
