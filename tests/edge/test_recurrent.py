"""Models with layers of linear attention on real onnxruntime: their states, alone, in company, and taken back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from edge.bundle import CacheType, Manifest, StateLayout
from edge.engine.engine import Engine
from edge.engine.kv_cache import Cache
from edge.engine.state_pool import StatePool
from edge.errors import ConfigError
from export.quantize.recipes import RECIPES
from tests.edge.prompts import feed, prompt
from tests.export import tiny_qwen3_5
from tests.tiny_bundles import export_tiny

START, STEPS = 20, 16
HEADS = {"equal heads": 2, "shared key heads": 4}


def export(folder: Path, recipe: str, value_heads: int = 4, kv: CacheType = "float32") -> Manifest:
    """A bundle wide enough for blocks of 128 to be two in a row."""
    config = tiny_qwen3_5.config(hidden_size=256, intermediate_size=384, linear_num_value_heads=value_heads)
    return export_tiny(folder, config, RECIPES[recipe], kv=kv)


@pytest.fixture(scope="module", params=[("equal heads", "float32"), ("shared key heads", "int8")], ids=" ".join)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized bundle: its int8 activations turn the last bit of a sum into a visible difference."""
    folder = tmp_path_factory.mktemp("qwen3_5")
    heads, kv = request.param
    export(folder, "balanced", HEADS[heads], kv)
    return folder / "bundle"


@pytest.fixture
def engine(bundle: Path) -> Engine:
    return make_engine(bundle)


def make_engine(bundle: Path) -> Engine:
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    return Engine(bundle, manifest, slots=3, context=96, draft_tokens=6, threads=2, prefill_chunk=32)


Memory = tuple[Cache, NDArray[np.float32]]


def memory(engine: Engine, slot: int, length: int) -> Memory:
    """All that a slot knows."""
    state = engine.read_state(slot, length)
    assert state is not None
    return engine.read_slot(slot, length), state


def assert_equal(found: Memory, expected: Memory) -> None:
    for array, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, other)


def decode_alone(engine: Engine, ids: NDArray[np.int64]) -> tuple[list[NDArray[np.float32]], Memory]:
    """Logits of each of some tokens after a prompt, decoded one by one in slot 0, and what is known afterwards."""
    feed(engine, 0, ids[:START], [START])
    logits = [engine.decode([0], [int(ids[past])], [past])[0].copy() for past in range(START, START + STEPS)]
    return logits, memory(engine, 0, START + STEPS)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_how_a_prompt_is_cut_does_not_change_one_bit(bundle: Path, threads: int) -> None:
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    engine = Engine(bundle, manifest, slots=1, context=96, threads=threads, prefill_chunk=64)
    ids = prompt(57)
    whole = feed(engine, 0, ids, [57])
    expected = memory(engine, 0, 57)
    for sizes in ([32, 25], [54, 3], [2] * 27 + [3], [10, 20, 24, 3]):
        np.testing.assert_array_equal(feed(engine, 0, ids, sizes), whole)
        assert_equal(memory(engine, 0, 57), expected)


def test_decode_and_odd_chunks_give_the_logits_of_prefill(tmp_path: Path) -> None:
    manifest = export(tmp_path, "fp32")
    engine = Engine(tmp_path / "bundle", manifest, slots=1, context=64, draft_tokens=4, threads=1, prefill_chunk=64)
    ids = prompt(25)
    whole = feed(engine, 0, ids, [25])
    for sizes in ([1] * 25, [5, 15, 5], [24, 1]):
        np.testing.assert_allclose(feed(engine, 0, ids, sizes), whole, rtol=0, atol=1e-5)
    feed(engine, 0, ids[:20], [20])
    for past in range(20, 25):
        logits = engine.decode([0], [int(ids[past])], [past])
    np.testing.assert_allclose(logits[0], whole, rtol=0, atol=1e-5)
    feed(engine, 0, ids[:20], [20])
    logits = engine.decode([0] * 5, ids[20:].tolist(), range(20, 25))
    np.testing.assert_allclose(logits[4], whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(engine.score(0, ids[:16], 0)[15], feed(engine, 0, ids[:16], [16]), rtol=0, atol=1e-5)


def test_company_changes_no_bit(engine: Engine) -> None:
    """Neither other sequences of a step, nor those whose prompts are read between steps, come or leave."""
    texts = [prompt(START + STEPS, seed) for seed in range(3)]
    expected = [decode_alone(engine, ids)[1] for ids in texts]
    rng = np.random.default_rng(4)
    past, leaves = [0] * 3, 1
    while min(past) < START + STEPS:
        if (reading := next((slot for slot in range(3) if past[slot] < START), None)) is not None:
            engine.prefill(reading, texts[reading][past[reading] :][:10], past[reading])
            past[reading] += 10
        running = [slot for slot in rng.permutation(3).tolist() if START <= past[slot] < START + STEPS]
        if slots := running[: int(rng.integers(0, 4))]:
            engine.decode(slots, [int(texts[slot][past[slot]]) for slot in slots], [past[slot] for slot in slots])
            past = [length + (slot in slots) for slot, length in enumerate(past)]
        if past[1] > START + 3 and leaves:
            engine.release_slot(1)
            past[1], leaves = 0, 0
    for slot in range(3):
        assert_equal(memory(engine, slot, START + STEPS), expected[slot])


@pytest.mark.parametrize("groups", [[4] * 4, [2] * 8, [6, 2, 6, 2], [1, 1, 8, 6], [8, 8]])
def test_several_tokens_in_one_step_change_no_bit(engine: Engine, groups: list[int]) -> None:
    ids = prompt(START + STEPS)
    expected_logits, expected = decode_alone(engine, ids)
    feed(engine, 0, ids[:START], [START])
    past = START
    for count in groups:
        logits = engine.decode([0] * count, ids[past : past + count].tolist(), range(past, past + count))
        for i in range(count):  # an 8-bit head rounds by row count
            np.testing.assert_allclose(logits[i], expected_logits[past + i - START], rtol=0, atol=1e-5)
        past += count
    assert_equal(memory(engine, 0, START + STEPS), expected)


def test_wrong_guesses_leave_no_trace(engine: Engine) -> None:
    """After each step of guesses, right or wrong, the slot goes on from before it, or from after it."""
    seed = 11
    rng = np.random.default_rng(seed)
    ids = prompt(START + STEPS)
    _, expected = decode_alone(engine, ids)
    feed(engine, 0, ids[:START], [START])
    past = START
    while past < START + STEPS:
        count = min(2 * int(rng.integers(1, 4)), START + STEPS - past)
        tokens = ids[past : past + count].tolist()
        if is_wrong := bool(rng.random() < 0.5):
            tokens[-1] += 1
        engine.decode([0] * count, tokens, range(past, past + count))
        assert engine.kept_length(0, past + count) == past + count
        assert engine.kept_length(0, past + count - 1) == past
        if not is_wrong and rng.random() < 0.5:
            past += count
        if past < START + STEPS:
            engine.decode([0], [int(ids[past])], [past])
            past += 1
    assert_equal(memory(engine, 0, START + STEPS), expected)


def test_guesses_beside_other_sequences_are_steps_of_their_own(engine: Engine) -> None:
    texts = [prompt(START + STEPS, seed) for seed in range(3)]
    expected = [decode_alone(engine, ids) for ids in texts]
    for slot, ids in enumerate(texts):
        feed(engine, slot, ids[:START], [START])
    for past in range(START, START + STEPS, 4):
        rows = [(2, past), *((0, past + i) for i in range(4)), (1, past)]
        logits = engine.decode(
            [slot for slot, _ in rows], [int(texts[slot][at]) for slot, at in rows], [at for _, at in rows]
        )
        for row, (slot, at) in zip(logits, rows, strict=True):
            np.testing.assert_allclose(row, expected[slot][0][at - START], rtol=0, atol=1e-5)
        for at in range(past + 1, past + 4):
            engine.decode([1, 2], [int(texts[1][at]), int(texts[2][at])], [at, at])
    for slot in range(3):
        assert_equal(memory(engine, slot, START + STEPS), expected[slot][1])


def test_a_slot_is_copied_read_and_written_with_its_state(engine: Engine) -> None:
    ids = prompt(START + STEPS)
    logits, _ = decode_alone(engine, ids)
    feed(engine, 2, ids[:START], [START])
    kept = memory(engine, 2, START)
    engine.copy_slot(2, 1, START)
    np.testing.assert_array_equal(engine.decode([1], [int(ids[START])], [START])[0], logits[0])
    engine.release_slot(2)
    engine.write_slot(2, kept[0], START)
    engine.write_state(2, kept[1], START)
    np.testing.assert_array_equal(engine.decode([2], [int(ids[START])], [START])[0], logits[0])


def test_a_used_slot_starts_afresh(engine: Engine) -> None:
    ids = prompt(START)
    expected = feed(engine, 0, ids, [START])
    feed(engine, 1, prompt(30, 5), [30])
    np.testing.assert_array_equal(feed(engine, 1, ids, [START]), expected)
    engine.release_slot(1)
    np.testing.assert_array_equal(feed(engine, 1, ids, [START]), expected)


def test_it_sleeps_and_goes_on_where_it_was(engine: Engine) -> None:
    ids = prompt(START + STEPS)
    logits, _ = decode_alone(engine, ids)
    feed(engine, 0, ids[:START], [START])
    engine.rest()
    engine.sleep()
    engine.wake()
    np.testing.assert_array_equal(engine.decode([0], [int(ids[START])], [START])[0], logits[0])


LAYOUT = StateLayout(layers=6, conv_channels=1024, conv_kernel=3, value_heads=8, key_dim=64, value_dim=64)


def test_states_take_memory_only_while_they_are_somebodys() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = StatePool(LAYOUT, slots=64)  # 160 MB
    assert process.memory_info().rss - before < 1 << 20
    for slot in range(8):
        pool.seek(slot, 0)
    assert process.memory_info().rss - before == pytest.approx(8 * LAYOUT.bytes_per_slot, rel=0.2)
    pool.branch(3)
    pool.seek(3, 0)
    for slot in range(8):
        pool.release(slot)
    pool.rest()
    assert process.memory_info().rss - before < 1 << 20


def test_a_state_moves_only_when_sequences_come_or_go() -> None:
    pool = StatePool(LAYOUT, slots=4)
    for slot in range(4):
        row = pool.seek(slot, 0)
        pool.rows(row, 1)["recurrent.5"][:] = slot + 1
    for slots, copies in (([2, 0], 2), ([0, 2], 0), ([0, 2], 0), ([0, 2, 1, 3], 2), ([3, 0], 4), ([2], 0)):
        before = pool.num_copied
        first, places = pool.arrange(slots)
        assert sorted(places) == list(range(len(slots)))
        assert pool.num_copied - before <= copies
        values = pool.rows(first, len(slots))["recurrent.5"][:, -1, -1, -1]
        assert [values[place] for place in places] == [slot + 1 for slot in slots]


def test_a_sequence_alone_stays_where_it_is() -> None:
    pool = StatePool(LAYOUT, slots=2)
    pool.seek(0, 0)
    pool.appended(0, 5)
    pool.arrange([0])
    copied = pool.num_copied
    pool.seek(1, 0)
    pool.appended(1, 7)
    for _ in range(3):
        pool.arrange([0])
        pool.appended(0, 1)
    pool.arrange([1, 0])
    assert pool.num_copied == copied, "one that is prefilled lies where it will be decoded"
    assert pool.kept_length(0, 8) == 8
    assert pool.kept_length(0, 7) == 0


def test_guesses_of_a_sequence_alone_copy_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(StatePool, "_move", lambda *move: copies.append(move))
    ids = prompt(START + STEPS)
    feed(engine, 1, ids[:START], [START])
    for past in range(START, START + STEPS, 4):  # two right guesses, two wrong ones, two plain steps
        engine.decode([1] * 2, ids[past : past + 2].tolist(), [past, past + 1])
        engine.decode([1] * 2, [7, 7], [past + 2, past + 3])
        for at in (past + 2, past + 3):
            engine.decode([1], [int(ids[at])], [at])
    assert not copies


def test_states_that_cannot_be_had_are_refused() -> None:
    layout = StateLayout(layers=4096, conv_channels=1, conv_kernel=1, value_heads=4096, key_dim=4096, value_dim=4096)
    with pytest.raises(ConfigError, match="cannot reserve"):
        StatePool(layout, slots=4096)
