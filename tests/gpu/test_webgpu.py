"""WebGPU: bundles for it give what the processor gives; the cache stays on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge.bundle import read_manifest
from edge.config import load_settings
from edge.engine.engine import Engine
from edge.loader import load_service
from export.quantize.recipes import RECIPES
from tests.gpu.pairs import FAMILIES, MakePair, Pair, greedy, need, prompt, read, relative

need("webgpu")

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_pair: MakePair) -> Pair:
    return make_pair(request.param, RECIPES["fp32"], "webgpu")


@pytest.fixture(scope="module")
def engines(pair: Pair) -> tuple[Engine, Engine]:
    return pair.engines("webgpu")


def test_sequences_that_share_steps_get_the_processors_tokens(engines: tuple[Engine, Engine]) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate((23, 5, 40))]
    on_cpu, on_gpu = (greedy(engine, prompts, 12) for engine in engines)
    assert on_gpu == on_cpu


def test_quantized_products(make_pair: MakePair) -> None:
    # Without int8 activations, whose rounding turns the smallest difference into a large one.
    pair = make_pair("qwen3", replace(RECIPES["balanced"], accuracy_level=0), "webgpu")
    ids = prompt(9, seed=6)
    expected, found = ((read(engine, 0, ids), engine.decode([0], [3], [9])[0]) for engine in pair.engines("webgpu"))
    assert relative(found[0], expected[0]) < TOLERANCE
    assert relative(found[1], expected[1]) < TOLERANCE


def test_all_positions_and_hidden_states(engines: tuple[Engine, Engine]) -> None:
    cpu, gpu = engines
    ids = prompt(11, seed=7)
    assert relative(gpu.score(0, ids, 0), cpu.score(0, ids, 0)) < TOLERANCE
    assert relative(gpu.embed(0, ids, 0), cpu.embed(0, ids, 0)) < TOLERANCE


def test_tokens_are_taken_back_and_slots_copied(engines: tuple[Engine, Engine]) -> None:
    found = []
    for engine in engines:
        read(engine, 0, prompt(30, seed=8))
        engine.decode([0, 0, 0], [5, 6, 7], [20, 21, 22])
        engine.copy_slot(0, 2, 21)
        found.append(engine.decode([2, 0], [9, 9], [21, 22]).copy())
    assert relative(found[1], found[0]) < TOLERANCE


def test_what_one_engine_read_another_goes_on_with(engines: tuple[Engine, Engine]) -> None:
    cpu, gpu = engines
    ids = prompt(18, seed=9)
    read(cpu, 1, ids)
    expected = cpu.decode([1], [3], [18]).copy()
    gpu.write_slot(1, cpu.read_slot(1, 18), 18)
    assert relative(gpu.decode([1], [3], [18]), expected) < TOLERANCE
    np.testing.assert_allclose(gpu.read_slot(1, 19), cpu.read_slot(1, 19), atol=1e-4)


def test_slots_outlive_the_weights(engines: tuple[Engine, Engine]) -> None:
    cpu, gpu = engines
    ids = prompt(18, seed=10)
    for engine in engines:
        read(engine, 1, ids)
        engine.sleep()
        engine.wake()
    assert relative(gpu.decode([1], [3], [18]), cpu.decode([1], [3], [18])) < TOLERANCE


def test_the_service_takes_it_by_itself(make_pair: MakePair) -> None:
    bundle: Path = make_pair("qwen3", RECIPES["balanced"], "webgpu").gpu
    settings = load_settings(None, {"QWEDGE_ENGINE_CONTEXT": "64", "QWEDGE_ENGINE_SLOTS": "2"})
    service = load_service(bundle, read_manifest(bundle), settings)
    assert service.provider.name == "webgpu"
