"""What a bundle and a product say: computed by the same code on this machine and under the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.bundle import read_manifest
from edge.engine.engine import Engine

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Said:
    """What follows a prompt, greedily."""

    tokens: list[int]
    logits: Floats
    """[tokens, padded_vocab], those that each token was the largest of."""


def open_engine(bundle: Path, *, context: int = 64, prefill_chunk: int = 16) -> Engine:
    """An engine with two threads that do not spin: under the emulator, spinning takes the time of those that work."""
    manifest = read_manifest(bundle)
    return Engine(bundle, manifest, slots=1, context=context, threads=2, prefill_chunk=prefill_chunk, spin_us=0)


def read(engine: Engine, prompt: NDArray[np.int64], sizes: Sequence[int] = ()) -> Floats:
    """The logits [padded_vocab] after a prompt that is read in steps of such sizes, or as large as they may be."""
    past = 0
    logits = np.empty(0, np.float32)
    for size in sizes or [engine.prefill_chunk] * -(-len(prompt) // engine.prefill_chunk):
        logits = engine.prefill(0, prompt[past : past + size], past)
        past = min(past + size, len(prompt))
    return logits.copy()


def say(engine: Engine, prompt: NDArray[np.int64], count: int, given: Sequence[int] = ()) -> Said:
    """Go on after a prompt.

    Args:
        engine: whose slot 0 is used.
        prompt: ids [n].
        count: tokens to generate.
        given: what is taken as the tokens, whatever the logits say: then those of two machines can be compared.
    """
    logits = [read(engine, prompt)]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < count:
        last = (given or tokens)[len(tokens) - 1]
        logits.append(engine.decode([0], [last], [len(prompt) + len(tokens) - 1])[0].copy())
        tokens.append(int(logits[-1].argmax()))
    return Said(tokens, np.stack(logits))


def multiply(model: Path, x: Floats, **config: str) -> Floats:
    """Run a graph of one product [rows, columns] with further settings of the session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in config.items():
        options.add_session_config_entry(name.replace("__", "."), value)
    session = ort.InferenceSession(str(model), options, ["CPUExecutionProvider"])
    result: Any = session.run(None, {"x": x})[0]
    return np.asarray(result, np.float32)
