"""Tests that compute on a GPU, or on a processor that plays one: ``make test-gpu`` sets up what they need."""

from __future__ import annotations

import pytest

from edge.bundle import Target
from export.quantize.recipes import Recipe
from tests.gpu.pairs import MakePair, Pair, export_pair


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> MakePair:
    """Exports a tiny model of a family."""

    def make(family: str, recipe: Recipe, target: Target) -> Pair:
        return export_pair(tmp_path_factory.mktemp(f"{family}-{target}"), family, recipe, target)

    return make
