"""LoRA adapters on real onnxruntime: what they compute, in which company, and which files are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.adapter import AdapterConfig
from edge.bundle import Manifest
from edge.engine.engine import Engine
from edge.engine.lora import Adapter
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.export import peft, tiny, tiny_qwen3_5
from tests.tiny_bundles import export_tiny

CONFIGS = {"qwen2": tiny.qwen2_config(), "qwen3": tiny.qwen3_config(), "qwen3_5": tiny_qwen3_5.text_config()}
# Different ranks (one that is no multiple of 16, one of two groups), targets and layers.
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "all": {"rank": 8, "seed": 1},
    "wide": {"rank": 20, "seed": 2, "targets": ("q_proj", "v_proj", "down_proj")},
    "late": {"rank": 4, "seed": 3, "targets": ("up_proj", "o_proj"), "layers": (1,)},
}
LENGTH = 12


@dataclass(frozen=True)
class Case:
    """A model with adapters, as a bundle that has places for them."""

    config: Mapping[str, Any]
    folder: Path
    manifest: Manifest

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    def engine(self, **options: Any) -> Engine:
        settings = {"slots": 5, "context": 64, "draft_tokens": 6, "threads": 2, "prefill_chunk": 32} | options
        return Engine(self.bundle, self.manifest, **settings)

    def read(self, engine: Engine, name: str) -> Adapter:
        entry = next(entry for entry in self.manifest.adapters if entry.name == name)
        return engine.places.read(self.bundle / entry.file, AdapterConfig(entry.rank, entry.scale))


def make_case(config: Mapping[str, Any], folder: Path, recipe: str) -> Case:
    shapes = {name: tensor.shape for name, tensor in tiny.random_tensors(config).items()}
    folders = {}
    for name, options in ADAPTERS.items():
        tensors = peft.adapter_tensors(shapes, **options)
        folders[name] = peft.write_adapter(folder / name, tensors, use_rslora=name == "wide")
    manifest = export_tiny(folder, config, RECIPES[recipe], name="tiny", adapters=folders)
    return Case(config, folder, manifest)


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An fp32 bundle: it can be compared with merged weights."""
    return make_case(CONFIGS[request.param], tmp_path_factory.mktemp(request.param), "fp32")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A quantized bundle: its int8 activations turn the last bit of a sum into a visible difference.

    Its MLP is so wide that onnxruntime shares the products of a few rows out between threads.
    """
    return make_case(tiny.qwen2_config(intermediate_size=2048), tmp_path_factory.mktemp("balanced"), "balanced")


def prompt(seed: int, length: int = LENGTH) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, tiny.NUM_IDS, length)


def merged_engine(case: Case, name: str | None, folder: Path) -> Engine:
    """The same model with an adapter merged into its weights by hand."""
    weights = tiny.random_tensors(case.config)
    if name is not None:
        options = ADAPTERS[name]
        adapter = peft.adapter_tensors({key: tensor.shape for key, tensor in weights.items()}, **options)
        rank = options["rank"]
        weights = peft.merge(weights, adapter, scale=2 * rank / (rank**0.5 if name == "wide" else rank))
    checkpoint_folder = tiny.write_folder(folder / "checkpoint", case.config)
    tiny.write_safetensors(checkpoint_folder / "model.safetensors", weights, "F32")
    with open_checkpoint(checkpoint_folder) as checkpoint:
        manifest = export_bundle(checkpoint, folder / "bundle", RECIPES["fp32"], progress=Silent()).manifest
    return Engine(folder / "bundle", manifest, slots=1, context=64, threads=1)


def test_at_run_time_it_computes_what_merged_weights_compute(case: Case, tmp_path: Path) -> None:
    """Four sequences in one step: three adapters, and none."""
    names = [None, *ADAPTERS]
    engine = case.engine()
    ids = [prompt(slot) for slot in range(len(names))]
    prefilled, decoded = [], []
    for slot, name in enumerate(names):
        engine.use_adapter(slot, None if name is None else case.read(engine, name))
        prefilled.append(engine.prefill(slot, ids[slot][:-1], 0).copy())
    decoded = engine.decode(range(4), [int(each[-1]) for each in ids], [LENGTH - 1] * 4)
    for slot, name in enumerate(names):
        merged = merged_engine(case, name, tmp_path / str(name))
        np.testing.assert_allclose(prefilled[slot], merged.prefill(0, ids[slot][:-1], 0), rtol=0, atol=1e-5)
        expected = merged.decode([0], [int(ids[slot][-1])], [LENGTH - 1])[0]
        np.testing.assert_allclose(decoded[slot], expected, rtol=0, atol=1e-5)
    assert np.abs(np.diff(prefilled, axis=0)).max(axis=1).min() > 0.01, "each is another model"


def steps(engine: Engine, slot: int, adapter: Adapter | None, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Keys and values of a sequence decoded by itself, after a prompt of :data:`LENGTH`."""
    engine.use_adapter(slot, adapter)
    engine.prefill(slot, ids[:LENGTH], 0)
    for past in range(LENGTH, len(ids)):
        engine.decode([slot], [int(ids[past])], [past])
    cache = engine.read_slot(slot, len(ids))
    engine.release_slot(slot)
    assert cache.dtype == np.float32
    return cache.astype(np.float32, copy=False)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_company_changes_no_bit(quantized: Case, threads: int) -> None:
    """Neither other rows, nor other adapters, nor several tokens of one sequence in a step."""
    engine = quantized.engine(threads=threads)
    adapters = [None, *(quantized.read(engine, name) for name in ADAPTERS), quantized.read(engine, "wide")]
    ids = [prompt(slot, LENGTH + 8) for slot in range(len(adapters))]
    expected = [steps(engine, slot, adapter, ids[slot]) for slot, adapter in enumerate(adapters)]
    for slot, adapter in enumerate(adapters):
        engine.use_adapter(slot, adapter)
        engine.prefill(slot, ids[slot][:5], 0)
        engine.prefill(slot, ids[slot][5:LENGTH], 5)
    rng, done = np.random.default_rng(0), [LENGTH] * len(adapters)
    while min(done) < LENGTH + 8:
        rows = [
            (slot, int(ids[slot][past]), past)
            for slot in range(len(adapters))
            for past in range(done[slot], min(done[slot] + int(rng.integers(0, 3)), LENGTH + 8))
        ]
        if rows:
            engine.decode(*zip(*(rows[i] for i in rng.permutation(len(rows))), strict=True))
            done = [start + sum(slot == row[0] for row in rows) for slot, start in enumerate(done)]
    for slot in range(len(adapters)):
        np.testing.assert_array_equal(engine.read_slot(slot, LENGTH + 8), expected[slot])


def test_several_tokens_of_a_sequence_are_computed_with_its_adapter(case: Case) -> None:
    engine = case.engine()
    ids = prompt(3, LENGTH + 4)
    for name in (None, *ADAPTERS):
        adapter = None if name is None else case.read(engine, name)
        expected = steps(engine, 1, adapter, ids)
        engine.use_adapter(1, adapter)
        engine.prefill(1, ids[:LENGTH], 0)
        engine.decode([1] * 4, ids[LENGTH:].tolist(), range(LENGTH, LENGTH + 4))
        np.testing.assert_allclose(engine.read_slot(1, LENGTH + 4), expected, rtol=0, atol=1e-5)
        engine.release_slot(1)


def test_a_released_slot_uses_no_adapter(case: Case) -> None:
    engine = case.engine()
    plain = engine.prefill(0, prompt(0), 0).copy()
    engine.use_adapter(0, case.read(engine, "all"))
    assert np.abs(engine.prefill(0, prompt(0), 0) - plain).max() > 0.01
    engine.release_slot(0)
    np.testing.assert_array_equal(engine.prefill(0, prompt(0), 0), plain)


def test_places_without_adapters_change_no_bit(quantized: Case, tmp_path: Path) -> None:
    with open_checkpoint(quantized.folder / "checkpoint") as checkpoint:
        manifest = export_bundle(checkpoint, tmp_path / "bundle", RECIPES["balanced"], progress=Silent()).manifest
    assert manifest.adapters == []
    plain = Engine(tmp_path / "bundle", manifest, slots=1, context=64, threads=2)
    assert not plain.places.linears
    expected = steps(plain, 0, None, prompt(1, 20))
    np.testing.assert_array_equal(steps(quantized.engine(), 0, None, prompt(1, 20)), expected)


def test_adapters_outlast_sleep(case: Case) -> None:
    engine = case.engine()
    engine.use_adapter(2, case.read(engine, "wide"))
    expected = engine.prefill(2, prompt(0), 0).copy()
    engine.sleep()
    engine.wake()
    np.testing.assert_array_equal(engine.prefill(2, prompt(0), 0), expected)


def test_adapters_that_come_and_go_leave_no_trace(quantized: Case) -> None:
    """Slots are taken and released in any order; what a sequence computes is always its own adapter's."""
    engine = quantized.engine()
    adapters = [None, *(quantized.read(engine, name) for name in ADAPTERS)]
    ids = prompt(0, LENGTH + 1)
    expected = [steps(engine, 0, adapter, ids) for adapter in adapters]
    rng = np.random.default_rng(1)
    using: dict[int, int] = {}
    for _ in range(60):
        slot = int(rng.integers(5))
        if using.pop(slot, None) is not None:
            engine.release_slot(slot)
            continue
        using[slot] = int(rng.integers(len(adapters)))
        engine.use_adapter(slot, adapters[using[slot]])
        engine.prefill(slot, ids[:LENGTH], 0)
        engine.decode(list(using), [int(ids[LENGTH])] * len(using), [LENGTH] * len(using))
        for each, index in using.items():
            np.testing.assert_array_equal(engine.read_slot(each, LENGTH + 1), expected[index])
