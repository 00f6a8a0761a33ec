"""Prompts of token ids for tiny models, and engines that read them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.engine.engine import Engine
from tests.export import tiny


def prompt(length: int, seed: int = 0) -> NDArray[np.int64]:
    """Random token ids [length]."""
    return np.random.default_rng(seed).integers(0, tiny.NUM_IDS, length)


def feed(engine: Engine, slot: int, ids: NDArray[np.int64], sizes: list[int]) -> NDArray[np.float32]:
    """Prefill ``ids`` in pieces of the given sizes and return the last logits."""
    past = 0
    for size in sizes:
        logits = engine.prefill(slot, ids[past : past + size], past)
        past += size
    assert past == len(ids)
    return logits.copy()
