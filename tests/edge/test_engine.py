"""The engine on real onnxruntime: tiny random models, exported by the product's own pipeline."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from edge.bundle import GRAPH, WEIGHTS, CacheType, KVLayout, Manifest, read_manifest
from edge.engine.engine import Engine
from edge.engine.kv_cache import KVPool
from edge.errors import BundleError, ConfigError
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES, Blockwise, Projections, Recipe
from tests.edge.prompts import feed, prompt
from tests.export import tiny
from tests.tiny_bundles import export_tiny

CONTEXT = 96
INT4 = Blockwise(bits=4, block=128)
EXACT = {
    "blocks of 128": Recipe("x", replace(Projections.all(INT4), out=Blockwise(bits=8, block=64)), INT4),
    "blocks of 32": Recipe("x", Projections.all(Blockwise(bits=4, block=32)), INT4),
    "int8": RECIPES["int8"],
}
"""Recipes whose sums onnxruntime orders differently, or not, by the number of rows."""


def export_for_bits(folder: Path, recipe: str, kv: CacheType = "float32") -> Manifest:
    """A bundle wide enough for blocks of 128 to be two in a row."""
    config = tiny.qwen2_config(hidden_size=256, intermediate_size=384)
    return export_tiny(folder, config, EXACT[recipe], kv=kv)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 bundle: batching and chunking must agree to rounding."""
    folder = tmp_path_factory.mktemp(request.param)
    export_tiny(folder, {"qwen2": tiny.qwen2_config, "qwen3": tiny.qwen3_config}[request.param]())
    return folder / "bundle"


@pytest.fixture
def engine(bundle: Path) -> Engine:
    return Engine(bundle, read_manifest(bundle), slots=4, context=CONTEXT, draft_tokens=6, threads=1, prefill_chunk=16)


def generate(engine: Engine, ids: NDArray[np.int64], count: int) -> list[int]:
    """Greedy tokens of one sequence alone in slot 0."""
    sizes = [min(16, len(ids) - start) for start in range(0, len(ids), 16)]
    tokens = [int(feed(engine, 0, ids, sizes).argmax())]
    while len(tokens) < count:
        tokens.append(int(engine.decode([0], [tokens[-1]], [len(ids) + len(tokens) - 1])[0].argmax()))
    return tokens


def test_chunked_prefill_gives_the_logits_of_one_prefill(engine: Engine) -> None:
    ids = prompt(16)
    whole = feed(engine, 0, ids, [16])
    for sizes in ([1, 15], [5, 5, 6], [15, 1]):
        np.testing.assert_allclose(feed(engine, 0, ids, sizes), whole, atol=1e-5)


def test_decode_gives_the_logits_of_prefill(engine: Engine) -> None:
    ids = prompt(12)
    whole = feed(engine, 0, ids, [12])
    feed(engine, 0, ids[:9], [9])
    for past in range(9, 12):
        logits = engine.decode([0], [int(ids[past])], [past])
    np.testing.assert_allclose(logits[0], whole, atol=1e-5)


def test_a_sequence_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate((3, 16, 9, 1))]
    alone = [generate(engine, ids, 8) for ids in prompts]
    tokens = [[int(feed(engine, slot, ids, [len(ids)]).argmax())] for slot, ids in enumerate(prompts)]
    for step in range(7):
        past = [len(ids) + step for ids in prompts]
        logits = engine.decode(range(4), [row[-1] for row in tokens], past)
        for row, values in zip(tokens, logits, strict=True):
            row.append(int(values.argmax()))
    assert tokens == alone


def test_prefill_of_one_slot_leaves_the_others_alone(engine: Engine) -> None:
    first, second = prompt(10, 1), prompt(14, 2)
    feed(engine, 0, first, [10])
    expected = engine.decode([0], [7], [10]).copy()
    feed(engine, 0, first, [10])
    feed(engine, 1, second, [14])
    np.testing.assert_array_equal(engine.decode([0], [7], [10]), expected)


def test_a_copied_slot_goes_on_as_the_other(engine: Engine) -> None:
    ids = prompt(11, 3)
    feed(engine, 2, ids, [11])
    expected = engine.decode([2], [5], [11]).copy()
    engine.copy_slot(2, 0, 11)
    np.testing.assert_array_equal(engine.decode([0], [5], [11]), expected)


def rows_of(owners: dict[int, list[int]], past: dict[int, int], rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """(slot, id, past) of every token, those of one slot anywhere among the others'."""
    rows = [(slot, ids[i], past[slot] + i) for slot, ids in owners.items() for i in range(len(ids))]
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.mark.parametrize(("recipe", "kv"), [*((recipe, "float32") for recipe in EXACT), ("blocks of 128", "int8")])
def test_several_tokens_of_a_sequence_in_one_step_change_no_bit(recipe: str, kv: CacheType, tmp_path: Path) -> None:
    """What makes speculation exact: int8 activations would turn the last bit of a sum into a visible difference."""
    manifest = export_for_bits(tmp_path, recipe, kv)
    engine = Engine(tmp_path / "bundle", manifest, slots=3, context=64, draft_tokens=6, threads=2, prefill_chunk=32)
    texts = {slot: prompt(48, slot).tolist() for slot in range(3)}
    start = {0: 20, 1: 9, 2: 30}
    plain = {}
    for slot, ids in texts.items():
        feed(engine, slot, np.array(ids[: start[slot]]), [start[slot]])
        for past in range(start[slot], start[slot] + 16):
            plain[slot, past] = engine.decode([slot], [ids[past]], [past])[0].copy()
    expected = [engine.read_slot(slot, start[slot] + 16) for slot in texts]
    rng = np.random.default_rng(5)
    for slot, ids in texts.items():
        engine.release_slot(slot)
        feed(engine, slot, np.array(ids[: start[slot]]), [start[slot]])
    done = dict(start)
    while any(done[slot] < start[slot] + 16 for slot in texts):
        left = {slot: start[slot] + 16 - done[slot] for slot in texts}
        counts = {slot: min(int(rng.integers(0, 4)), left[slot]) for slot in texts}
        owners = {slot: texts[slot][done[slot] : done[slot] + n] for slot, n in counts.items() if n}
        if not owners:
            continue
        rows = rows_of(owners, done, rng)
        logits = engine.decode(*zip(*rows, strict=True))
        for (slot, _, past), row in zip(rows, logits, strict=True):
            np.testing.assert_allclose(row, plain[slot, past], rtol=0, atol=1e-5)  # an 8-bit head rounds by row count
        done = {slot: done[slot] + counts[slot] for slot in texts}
    for slot in texts:
        np.testing.assert_array_equal(engine.read_slot(slot, start[slot] + 16), expected[slot])


def test_it_sleeps_and_goes_on_where_it_was(engine: Engine) -> None:
    ids = prompt(10, 1)
    feed(engine, 1, ids, [10])
    expected = engine.decode([1], [7], [10]).copy()
    engine.sleep()
    engine.wake()
    engine.wake()
    np.testing.assert_array_equal(engine.decode([1], [7], [10]), expected)


def test_it_does_not_wake_up_with_another_model(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    engine = Engine(copy, read_manifest(copy), slots=1, context=32, threads=1)
    engine.sleep()
    weights = bytearray((copy / WEIGHTS).read_bytes())
    weights[5000] ^= 1
    (copy / WEIGHTS).write_bytes(weights)
    with pytest.raises(BundleError):
        engine.wake()


def test_a_used_slot_starts_afresh(engine: Engine) -> None:
    expected = generate(engine, prompt(6, 4), 5)
    feed(engine, 0, prompt(16, 5), [16])
    engine.release_slot(0)
    assert generate(engine, prompt(6, 4), 5) == expected
    feed(engine, 0, prompt(16, 5), [16])
    # Without a release the old tokens lie beyond the new length, where nothing may look.
    assert generate(engine, prompt(6, 4), 5) == expected


def test_the_context_can_be_filled_to_the_last_token(engine: Engine) -> None:
    tokens = generate(engine, prompt(16), CONTEXT - 16)
    assert len(tokens) == CONTEXT - 16
    assert all(0 <= token < engine.manifest.padded_vocab_size for token in tokens)


def test_a_graph_that_onnxruntime_refuses_is_a_bundle_error(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / GRAPH).write_bytes((bundle / GRAPH).read_bytes()[:200])
    with pytest.raises(BundleError, match="onnxruntime cannot load"):
        Engine(tmp_path, read_manifest(bundle), slots=1, context=32)


LAYOUT = KVLayout(layers=8, kv_heads=4, head_dim=64)


def fill(pool: KVPool, slot: int, length: int, value: float) -> None:
    pool.write(slot, np.full((2 * pool.layers, 4, length, 64), value, np.float32), length)


def test_the_pool_takes_memory_only_for_tokens_that_are_in_it() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = KVPool(LAYOUT, slots=8, context=32768, rows=16)  # 4 GiB of slots, 8 GiB of window
    assert process.memory_info().rss - before < 8 << 20
    fill(pool, 3, 2048, 1)
    pool.show([3])
    for layer in range(LAYOUT.layers):
        keys, values = pool.rows(layer, 1)
        assert keys[:, :, :2048].min() == values[:, :, :2048].min() == 1
    # Once, although a slot and a row of the window show the same memory.
    assert process.memory_info().rss - before == pytest.approx(2048 * LAYOUT.bytes_per_token, rel=0.2)
    pool.release(3)
    assert process.memory_info().rss - before < 8 << 20
    assert not pool.slot(0, 3)[0][0, 0, 0].any()


def test_rows_show_the_wanted_slots_and_stay_where_they_can() -> None:
    pool = KVPool(LAYOUT, slots=4, context=64, rows=6)
    for slot in range(4):
        fill(pool, slot, 8, slot + 1)

    def shown(count: int) -> list[float]:
        return [float(pool.rows(7, count)[1][row, 3, 7, 63]) for row in range(count)]

    assert pool.show([2, 0]) == [0, 1]
    assert shown(2) == [3, 1]
    assert pool.show([0, 2]) == [1, 0], "nothing is mapped anew"
    places = pool.show([0, 0, 2, 0, 3])
    assert sorted(places) == list(range(5))
    values = shown(5)
    assert [values[place] for place in places] == [1, 1, 3, 1, 4]
    assert pool.show([1]) == [0]
    assert shown(1) == [2]
    fill(pool, 1, 8, 9)
    assert shown(1) == [9], "it is the slot itself, no copy"
    pool.copy(1, 3, 8)
    np.testing.assert_array_equal(pool.read(3, 8), pool.read(1, 8))


def test_int8_slots_take_a_quarter() -> None:
    layout = KVLayout(layers=2, kv_heads=2, head_dim=32, dtype="int8")
    pool = KVPool(layout, slots=1, context=128, rows=1)
    assert pool.read(0, 5).dtype == np.int8
    assert pool.read(0, 5).nbytes == 5 * layout.bytes_per_token


def test_a_pool_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot reserve"):
        KVPool(KVLayout(layers=4096, kv_heads=4096, head_dim=4096), slots=4096, context=1 << 30, rows=4096)


@pytest.mark.parametrize("recipe", EXACT)
def test_how_a_prompt_is_cut_does_not_change_one_bit(recipe: str, tmp_path: Path) -> None:
    manifest = export_for_bits(tmp_path, recipe)
    engine = Engine(tmp_path / "bundle", manifest, slots=1, context=64, threads=1, prefill_chunk=64)
    ids = prompt(25)
    whole = feed(engine, 0, ids, [25])
    keys_and_values = engine.read_slot(0, 25)
    for sizes in ([12, 13], [22, 3], [24, 1], [1] * 25, [3, 7, 14, 1]):
        np.testing.assert_array_equal(feed(engine, 0, ids, sizes), whole)
        np.testing.assert_array_equal(engine.read_slot(0, 25), keys_and_values)


def test_a_prompt_that_fills_the_context_has_room_for_what_fills_a_step_up(tmp_path: Path) -> None:
    manifest = export_for_bits(tmp_path, "blocks of 128")
    engine = Engine(tmp_path / "bundle", manifest, slots=2, context=256, threads=1, prefill_chunk=64)
    assert engine.context_length == manifest.context_length == 256
    ids = prompt(256)
    whole = feed(engine, 0, ids, [64] * 4)
    np.testing.assert_array_equal(feed(engine, 1, ids, [64, 64, 64, 63, 1]), whole)
    np.testing.assert_array_equal(feed(engine, 0, ids, [64, 64, 63, 62, 3]), whole)


def test_score_gives_the_logits_of_every_position(engine: Engine) -> None:
    ids = prompt(14, 6)
    expected = [feed(engine, 0, ids[:length], [length]) for length in range(11, 15)]
    feed(engine, 0, ids[:10], [10])
    logits = engine.score(0, ids[10:], 10)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_quantized_and_float_bundles_have_the_same_interface(tmp_path: Path) -> None:
    with open_checkpoint(tiny.write_folder(tmp_path / "checkpoint", tiny.qwen2_config())) as checkpoint:
        for recipe in RECIPES.values():
            folder = tmp_path / recipe.name
            manifest: Manifest = export_bundle(checkpoint, folder, recipe, progress=Silent()).manifest
            engine = Engine(folder, manifest, slots=2, context=64, threads=1)
            logits = engine.prefill(0, prompt(5), 0)
            assert logits.shape == (manifest.padded_vocab_size,)
            assert np.isfinite(logits).all()
