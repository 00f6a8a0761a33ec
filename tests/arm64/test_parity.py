"""Kernels of ARM64 beside those of the machine that emulates it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest

from edge.machine import isa_features
from edge.tokenizer import Tokenizer
from tests.arm64.values import multiply, open_engine, read, say

FOLDER = Path(os.environ["ARM64_REFERENCE"])
VALUES = dict(np.load(FOLDER / "values.npz"))
BUNDLES = sorted((FOLDER / "bundles").iterdir())
FLOATS = [bundle for bundle in BUNDLES if bundle.name.endswith("fp32")]
INTEGERS = [bundle for bundle in BUNDLES if bundle not in FLOATS]
PRODUCTS = sorted((FOLDER / "products").iterdir())
HAS_BYTES = "asimddp" in isa_features()
"""Whether this core multiplies bytes; one that cannot takes the activations as they are."""


def test_this_is_the_processor_that_was_asked_for() -> None:
    features = {"cortex-a72": {"asimd"}, "cortex-a76": {"asimd", "asimddp"}}
    everything = {"asimd", "asimddp", "i8mm", "bf16"}
    assert platform.machine() == "aarch64"
    assert set(isa_features()) - {"sve"} == features.get(os.environ["QEMU_CPU"], everything)


@pytest.mark.parametrize("bundle", FLOATS, ids=lambda b: b.name)
def test_floats_say_the_same_text(bundle: Path) -> None:
    said = say(open_engine(bundle), VALUES["prompt"], len(VALUES[f"{bundle.name}.tokens"]))
    assert said.tokens == VALUES[f"{bundle.name}.tokens"].tolist()
    np.testing.assert_allclose(said.logits, VALUES[f"{bundle.name}.logits"], atol=1e-4)
    assert Tokenizer.load(bundle / "tokenizer.json").decode(said.tokens) == str(VALUES[f"{bundle.name}.text"])


@pytest.mark.parametrize("bundle", INTEGERS, ids=lambda b: b.name)
def test_integers_agree_within_their_kernels_errors(bundle: Path) -> None:
    """Tokens of random weights are near ties: what is best here must be among the best there."""
    # A token whose hidden state is nearly nothing before a norm shows every rounding, so it must be the same rounding.
    expected = VALUES[f"{bundle.name}.{'logits' if HAS_BYTES else 'exact'}"]
    tokens = VALUES[f"{bundle.name}.tokens"].tolist()
    said = say(open_engine(bundle), VALUES["prompt"], len(tokens), given=tokens)
    error = said.logits - expected
    lead = expected.max(axis=1) - expected[range(len(tokens)), said.tokens]
    assert np.isfinite(said.logits).all()
    assert np.sqrt((error**2).mean()) < (0.05 if HAS_BYTES else 1e-4) * expected.std()
    assert lead.max() < 0.5


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda b: b.name)
def test_how_a_prompt_is_cut_changes_no_bit(bundle: Path) -> None:
    engine = open_engine(bundle, prefill_chunk=32)
    whole = read(engine, VALUES["prompt"], [25])
    cache = engine.read_slot(0, 25)
    # The scheduler cuts the prompts of models with states where nothing has to fill a step up (edge/snapshots.py).
    has_states = engine.manifest.state is not None
    for sizes in ([12, 13], [4, 8, 13]) if has_states else ([12, 13], [3, 7, 14, 1], [24, 1]):
        np.testing.assert_array_equal(read(engine, VALUES["prompt"], sizes), whole)
        np.testing.assert_array_equal(engine.read_slot(0, 25), cache)


@pytest.mark.parametrize("model", PRODUCTS, ids=lambda model: model.stem)
def test_products_agree(model: Path) -> None:
    expected = VALUES[model.stem if HAS_BYTES else f"{model.stem}.exact"]
    np.testing.assert_allclose(multiply(model, VALUES["x"], mlas__disable_kleidiai="1"), expected, atol=1e-2)
    # The fast kernels round the activations and the scales more coarsely.
    error = multiply(model, VALUES["x"]) - expected
    assert np.sqrt((error**2).mean()) < 0.02 * expected.std()


@pytest.mark.parametrize("model", PRODUCTS, ids=lambda model: model.stem)
def test_products_round_a_row_alike_in_any_company(model: Path) -> None:
    """What edge/engine/rows.py says of ARM64."""
    whole = multiply(model, VALUES["x"])
    least = 1 if HAS_BYTES else 2
    for count in (least, 3, 5, 8, 14, 36):
        np.testing.assert_array_equal(multiply(model, VALUES["x"][:count]), whole[:count])
