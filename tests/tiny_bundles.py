"""Bundles of tiny random models, exported by the product's own pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge.bundle import Manifest
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES, Recipe
from tests.export import tiny

FP32 = RECIPES["fp32"]


def export_tiny(folder: Path, config: Mapping[str, Any], recipe: Recipe = FP32, **options: Any) -> Manifest:
    """Export a model of this configuration.

    Args:
        folder: gets ``checkpoint`` and ``bundle``.
        config: of the checkpoint, see :mod:`tests.export.tiny`.
        recipe: of the bundle.
        options: of :func:`export.pipeline.export_bundle`.
    """
    with open_checkpoint(tiny.write_folder(folder / "checkpoint", config)) as checkpoint:
        return export_bundle(checkpoint, folder / "bundle", recipe, progress=Silent(), **options).manifest
