"""CUDA: a bundle for it, in float16, gives what the processor gives in float32, as far as float16 goes."""

from __future__ import annotations

import pytest

from edge.engine.engine import Engine
from export.quantize.recipes import RECIPES
from tests.gpu.pairs import FAMILIES, MakePair, Pair, need, prompt, read, relative

need("cuda")

TOLERANCE = 0.01


@pytest.fixture(scope="module", params=[(family, recipe) for family in FAMILIES for recipe in ("fp32", "quality")])
def pair(request: pytest.FixtureRequest, make_pair: MakePair) -> Pair:
    family, recipe = request.param
    return make_pair(family, RECIPES[recipe], "cuda")


@pytest.fixture(scope="module")
def engines(pair: Pair) -> tuple[Engine, Engine]:
    return pair.engines("cuda")


def test_a_prompt_and_the_tokens_after_it(engines: tuple[Engine, Engine]) -> None:
    ids = prompt(40, seed=0)
    cpu, gpu = engines
    assert relative(read(gpu, 0, ids), read(cpu, 0, ids)) < TOLERANCE
    for past, token in enumerate((5, 9, 33), len(ids)):
        assert relative(gpu.decode([0], [token], [past]), cpu.decode([0], [token], [past])) < TOLERANCE


def test_all_positions_and_hidden_states(engines: tuple[Engine, Engine]) -> None:
    cpu, gpu = engines
    ids = prompt(11, seed=7)
    assert relative(gpu.score(0, ids, 0), cpu.score(0, ids, 0)) < TOLERANCE
    assert relative(gpu.embed(0, ids, 0), cpu.embed(0, ids, 0)) < TOLERANCE


def test_the_cache_moves_between_slots(engines: tuple[Engine, Engine]) -> None:
    found = []
    for engine in engines:
        read(engine, 0, prompt(30, seed=8))
        engine.copy_slot(0, 2, 21)
        found.append(engine.decode([2], [9], [21]).copy())
    assert relative(found[1], found[0]) < TOLERANCE
