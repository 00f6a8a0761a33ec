"""Tiny models, each as a bundle for processors and as one for a GPU, and what is asked of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import Manifest, Target, read_manifest
from edge.engine.engine import Engine
from edge.engine.providers import Provider, survey
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import Recipe
from tests.export import tiny

FAMILIES = {"qwen2": tiny.qwen2_config, "qwen3": tiny.qwen3_config}
CONTEXT = 96
PREFILL = 16


@dataclass(frozen=True)
class Pair:
    """One checkpoint as a bundle for processors, and as one for a GPU."""

    cpu: Path
    gpu: Path

    @property
    def manifest(self) -> Manifest:
        """Of the bundle for a GPU."""
        return read_manifest(self.gpu)

    def engines(self, provider: Provider) -> tuple[Engine, Engine]:
        """One on the processor, one on the GPU."""
        return _engine(self.cpu, "cpu"), _engine(self.gpu, provider)


MakePair = Callable[[str, Recipe, Target], Pair]


def export_pair(folder: Path, family: str, recipe: Recipe, target: Target) -> Pair:
    """Export a tiny model of a family twice."""
    config = FAMILIES[family](hidden_size=128, intermediate_size=192)
    with open_checkpoint(tiny.write_folder(folder / "checkpoint", config)) as checkpoint:
        export_bundle(checkpoint, folder / "cpu", recipe, progress=Silent())
        export_bundle(checkpoint, folder / "gpu", recipe, target=target, progress=Silent())
    return Pair(folder / "cpu", folder / "gpu")


def need(provider: Provider) -> None:
    """Skip what cannot be run here, and say why."""
    finding = next(each for each in survey() if each.provider == provider)
    if not finding.usable:
        pytest.skip(f"nothing ran on {provider}: {finding.reason}; {finding.hint}", allow_module_level=True)


def _engine(bundle: Path, provider: Provider) -> Engine:
    return Engine(
        bundle, read_manifest(bundle), slots=3, context=CONTEXT, threads=1, prefill_chunk=PREFILL, provider=provider
    )


def prompt(length: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, tiny.NUM_IDS, length)


def read(engine: Engine, slot: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Prefill in chunks; the logits of the last token."""
    past = 0
    while past < len(ids):
        part = ids[past : past + engine.prefill_chunk]
        logits = engine.prefill(slot, part, past).copy()
        past += len(part)
    return logits


def greedy(engine: Engine, prompts: list[NDArray[np.int64]], count: int) -> list[list[int]]:
    """Tokens of sequences that are decoded together, one slot each."""
    texts = [[int(read(engine, slot, ids).argmax())] for slot, ids in enumerate(prompts)]
    lengths = [len(ids) for ids in prompts]
    for _ in range(count - 1):
        logits = engine.decode(range(len(texts)), [text[-1] for text in texts], lengths)
        lengths = [length + 1 for length in lengths]
        for text, row in zip(texts, logits, strict=True):
            text.append(int(row.argmax()))
    return texts


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
