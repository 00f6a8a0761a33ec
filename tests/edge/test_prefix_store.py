"""Prefixes on disk: what gets there, what comes back after a restart, and that bad disks and bad files do no harm."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle import verify_bundle
from edge.config import load_settings
from edge.engine.prefix import MIN_TOKENS, begins_with, longest_match, reusable_length
from edge.engine.prefix_cache import EVERYONE, Prefix, PrefixCache
from edge.engine.prefix_store import MAX_QUEUED, PrefixStore
from edge.loader import load_service
from edge.service import Finished, Service
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.edge.test_scheduler import Client
from tests.export import tiny
from tests.serving import wait_for
from tests.tiny_bundles import export_tiny

ROOT = Path(__file__).parents[2]
MODEL = b"a model"
BUDGET = 1 << 20
SYSTEM = 300


def tokens(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 50_000, count)


def make(ids: NDArray[np.int64], identity: str = "", dtype: type[np.generic] = np.float32) -> Prefix:
    """Keys and values follow from the ids, so that a mix-up shows."""
    cache = (ids[None, None, :, None] * np.arange(1, 9).reshape(4, 1, 1, 2)).astype(dtype)
    return Prefix(identity, ids, cache)


def with_state(ids: NDArray[np.int64], identity: str = "") -> Prefix:
    """As of a model with linear attention; keys and values end where their size is no multiple of four."""
    cache = make(ids, identity, np.int8).cache[:1, :, :, :1]
    return Prefix(identity, ids, cache, (ids[:50] / 3).astype(np.float32))


def opened(folder: Path, budget: int = BUDGET, model: bytes = MODEL) -> PrefixStore:
    store = PrefixStore.open(folder, budget, model)
    assert store is not None
    return store


@contextmanager
def cached(folder: Path, budget: int = BUDGET, model: bytes = MODEL) -> Iterator[tuple[PrefixCache, PrefixStore]]:
    """A cache and its store, as one run of the server has them."""
    store = opened(folder, budget, model)
    cache = PrefixCache(BUDGET, store)
    try:
        yield cache, store
    finally:
        cache.close()


def keep(folder: Path, prefix: Prefix) -> Path:
    """One run that leaves exactly this prefix behind; gives its file."""
    before = set(files(folder))
    store = opened(folder)
    store.close([prefix], timeout_s=10)
    (file,) = set(files(folder)) - before
    return file


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.prefix"))


def with_question(ids: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    return np.concatenate([ids, tokens(40, seed)])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_a_prefix_comes_back_after_a_restart(tmp_path: Path, dtype: type[np.generic]) -> None:
    prefix = make(tokens(SYSTEM, 1), dtype=dtype)
    keep(tmp_path / "store", prefix)
    with cached(tmp_path / "store") as (cache, store):
        found = cache.find("", with_question(prefix.ids, 2))
        assert found is not None
        assert found[1] == SYSTEM
        assert found[0].identity == ""
        assert found[0].cache.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found[0].ids, prefix.ids)
        np.testing.assert_array_equal(found[0].cache, prefix.cache)
        assert cache.find("", with_question(prefix.ids, 3)) is not None
        assert store.stats().num_loaded == 1, "the second time it is in memory"


def test_a_state_comes_back_with_its_prefix_and_only_for_all_of_it(tmp_path: Path) -> None:
    prefix = with_state(tokens(SYSTEM + 1, 1))
    keep(tmp_path, prefix)
    with cached(tmp_path) as (cache, store):
        assert cache.find("", with_question(prefix.ids[:-1], 2)) is None
        for length in (SYSTEM + 1, SYSTEM + 2):
            found = cache.find("", with_question(prefix.ids, 2)[:length])
            assert found is None, "the last token has to be computed, and not by itself"
        assert store.stats().num_loaded == 0
        found = cache.find("", with_question(prefix.ids, 2))
        assert found is not None
        assert found[1] == SYSTEM + 1
        assert found[0].state is not None
        assert prefix.state is not None
        np.testing.assert_array_equal(found[0].cache, prefix.cache)
        np.testing.assert_array_equal(found[0].state, prefix.state)
    assert len(files(tmp_path)) == 1, "what came from the disk is not written again"


def test_beginnings_with_a_state_stay_beside_what_begins_with_them(tmp_path: Path) -> None:
    talk = tokens(1200, 1)
    with cached(tmp_path) as (cache, store):
        cache.put(with_state(talk[:400]), shared=True)
        wait_for(lambda: store.stats().num_written == 1)
        cache.put(with_state(talk[:500]), shared=True)  # too little more for a write
        cache.put(with_state(talk[:900]))
        assert cache.find("", talk[:1000]) is not None
    with cached(tmp_path) as (cache, _):
        lengths = [found[1] if (found := cache.find("", talk[:length])) else 0 for length in (1000, 700, 300)]
        assert lengths == [900, 400, 0]


def test_only_what_two_requests_had_in_common_is_written(tmp_path: Path) -> None:
    system = tokens(SYSTEM, 1)
    with cached(tmp_path) as (cache, store):
        cache.put(make(with_question(system, 2)))
        assert store.stats().num_written == 0
        for seed in range(3, 9):
            ids = with_question(system, seed)
            found = cache.find("", ids)
            assert found is not None
            assert found[1] >= SYSTEM
            cache.put(make(ids))
        wait_for(lambda: store.stats().num_written == 1)
    with cached(tmp_path) as (cache, store):
        assert store.stats().num_files == 1
        found = cache.find("", with_question(system, 99))
        assert found is not None
        np.testing.assert_array_equal(found[0].ids, system)
        np.testing.assert_array_equal(found[0].cache, make(system).cache)


def test_a_conversation_is_written_once_and_in_the_end(tmp_path: Path) -> None:
    talk = tokens(1200, 1)
    with cached(tmp_path) as (cache, store):
        for length in (300, 600, 900):
            cache.find("", talk[:length])
            cache.put(make(talk[:length]))
        assert store.stats().num_written == 0
    assert len(files(tmp_path)) == 1
    with cached(tmp_path) as (cache, store):
        found = cache.find("", talk)
        assert found is not None
        assert found[1] == 900
        cache.put(make(talk))
    assert len(files(tmp_path)) == 1, "the longer conversation takes the place of the shorter"
    with cached(tmp_path) as (cache, store):
        assert store.longest("", talk) is not None
        assert store.stats().num_written == 0


def test_what_came_only_once_or_is_short_is_never_written(tmp_path: Path) -> None:
    with cached(tmp_path) as (cache, _):
        cache.put(make(tokens(500, 1)))
        short = tokens(200, 2)
        cache.put(make(with_question(short, 3)))
        assert cache.find("", with_question(short, 4)) is not None
    assert files(tmp_path) == []


def test_nobody_finds_what_belongs_to_somebody_else(tmp_path: Path) -> None:
    file = keep(tmp_path, make(tokens(SYSTEM, 1), "mqtt:alice"))
    assert b"alice" not in file.read_bytes()
    with cached(tmp_path) as (cache, store):
        for identity in ("", "mqtt:bob", EVERYONE):
            assert cache.find(identity, with_question(tokens(SYSTEM, 1), 2)) is None
        assert store.stats().num_loaded == 0
        assert cache.find("mqtt:alice", with_question(tokens(SYSTEM, 1), 2)) is not None


def test_what_is_for_everyone_is_written_at_once_and_found_by_all(tmp_path: Path) -> None:
    system = tokens(SYSTEM, 1)
    with cached(tmp_path) as (cache, store):
        cache.put(make(system, EVERYONE))
        wait_for(lambda: store.stats().num_written == 1)
        assert cache.find("", with_question(system, 2)) is not None
    for identity in ("", "mqtt:bob"):
        with cached(tmp_path) as (cache, store):
            found = cache.find(identity, with_question(system, 2))
            assert found is not None
            assert found[0].identity == EVERYONE
            assert cache.has(identity, system), "no second copy for one client"
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("kind", [make, with_state])
def test_no_changed_byte_gets_through(tmp_path: Path, kind: Callable[[NDArray[np.int64]], Prefix]) -> None:
    seed = 20
    rng = random.Random(seed)
    prefix = kind(tokens(SYSTEM, 1))
    file = keep(tmp_path, prefix)
    good = file.read_bytes()
    spots = [*range(0, 104, 3), *(rng.randrange(len(good)) for _ in range(120)), *range(len(good) - 32, len(good), 5)]
    damaged = [bytes([*good[:at], good[at] ^ (1 << rng.randrange(8)), *good[at + 1 :]]) for at in spots]
    damaged += [good[: rng.randrange(len(good))] for _ in range(20)] + [b"", good + b"\0", good + good]
    damaged += [rng.randbytes(rng.randrange(2000)) for _ in range(10)]
    for number, data in enumerate(damaged):
        file.write_bytes(data)
        with cached(tmp_path) as (cache, store):
            found = cache.find("", with_question(prefix.ids, 2))
            # A flipped owner or first id is nobody's: the file stays, unread, until room is needed.
            foreign = store.stats().num_loaded == 0 and store.stats().num_files == 1
        assert found is None, f"seed {seed}, case {number}"
        assert not file.exists() or foreign, f"seed {seed}, case {number}"
        if not file.exists():
            file.touch(0o600)
    file.write_bytes(good)
    with cached(tmp_path) as (cache, _):
        assert cache.find("", with_question(prefix.ids, 2)) is not None


def test_a_file_changed_behind_our_back_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = make(tokens(SYSTEM, 1))
    file = keep(tmp_path, prefix)
    other = keep(tmp_path, make(tokens(SYSTEM, 5)))
    with cached(tmp_path) as (cache, store):
        file.write_bytes(other.read_bytes())  # authentic, but not what the index knows
        assert cache.find("", with_question(prefix.ids, 2)) is None
        assert store.stats().num_unusable == 1
    assert not file.exists()
    assert len(warnings(caplog)) == 1


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=8), st.lists(st.integers(0, 1), max_size=12))
def test_the_longest_match_is_the_longest(tails: list[list[int]], tail: list[int]) -> None:
    def ids(end: list[int]) -> NDArray[np.int64]:
        return np.array([7] * (MIN_TOKENS - 4) + end, np.int64)

    lengths = [reusable_length(ids(other), ids(tail)) for other in tails]
    best = max(lengths, default=0)
    expected = (lengths.index(best), best) if best else None
    assert longest_match(enumerate(map(ids, tails)), ids(tail)) == expected
    for other in tails:
        assert begins_with(ids(other), ids(tail)) == (other[: len(tail)] == tail)


def spoil_key(folder: Path) -> None:
    (folder / "key").write_bytes(bytes(32))


def shorten_key(folder: Path) -> None:
    (folder / "key").write_bytes(b"?")


def drop_key(folder: Path) -> None:
    (folder / "key").unlink()


def nothing(_folder: Path) -> None:
    """The folder stays as it is."""


@pytest.mark.parametrize(
    ("spoil", "model"),
    [(nothing, b"another model"), (spoil_key, MODEL), (shorten_key, MODEL), (drop_key, MODEL)],
    ids=["another model", "another key", "no key", "key lost"],
)
def test_what_another_model_or_device_made_is_removed(
    tmp_path: Path, spoil: Callable[[Path], None], model: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = make(tokens(SYSTEM, 1))
    keep(tmp_path, prefix)
    keep(tmp_path, make(tokens(SYSTEM, 2)))
    spoil(tmp_path)
    with cached(tmp_path, model=model) as (cache, store):
        assert files(tmp_path) == []
        assert cache.find("", with_question(prefix.ids, 2)) is None
        cache.put(make(prefix.ids, EVERYONE))
        wait_for(lambda: store.stats().num_written == 1)
    assert len(warnings(caplog)) == 1


def test_links_and_files_of_others_are_removed_and_not_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, precious = tmp_path / "store", tmp_path / "precious"
    file = keep(store, make(tokens(SYSTEM, 1)))
    precious.write_bytes(file.read_bytes())
    precious.chmod(0o600)
    file.chmod(0o644)
    (store / "symbolic.prefix").symlink_to(precious)
    (store / "hard.prefix").hardlink_to(precious)
    os.mkfifo(store / "pipe.prefix", 0o600)
    (store / "half.prefix.tmp").write_bytes(b"half")
    (store / "notes.txt").write_text("not ours")
    with cached(store) as (cache, _):
        assert cache.find("", with_question(tokens(SYSTEM, 1), 2)) is None
        assert sorted(path.name for path in store.iterdir()) == ["key", "lock", "notes.txt"]
    assert precious.exists()
    assert len(warnings(caplog)) == 1


def test_folder_and_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "store"
    mask = os.umask(0)
    try:
        keep(folder, make(tokens(SYSTEM, 1)))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("kind", ["open to others", "a file", "below a file"])
def test_without_a_usable_folder_there_is_no_store(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "store"
    if kind == "open to others":
        folder.mkdir(mode=0o755)
    else:
        folder.touch()
    assert PrefixStore.open(folder / "x" if kind == "below a file" else folder, BUDGET, MODEL) is None
    assert len(warnings(caplog)) == 1


def test_a_second_process_runs_without_the_store(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from edge.engine.prefix_store import PrefixStore
print(PrefixStore.open(Path({str(tmp_path)!r}), {BUDGET}, {MODEL!r}) is not None)
"""

    def second() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )

    with cached(tmp_path) as (cache, _):
        done = second()
        assert done.stdout == "False\n"
        assert "another process uses" in done.stderr
        cache.put(make(tokens(SYSTEM, 1), EVERYONE))
    assert len(files(tmp_path)) == 1
    assert second().stdout == "True\n"


def test_the_least_recently_used_files_go_first_even_after_a_restart(tmp_path: Path) -> None:
    prefixes = [make(tokens(SYSTEM, seed)) for seed in range(5)]
    size = keep(tmp_path, prefixes[0]).stat().st_size
    for prefix in prefixes[1:3]:
        keep(tmp_path, prefix)
    with cached(tmp_path, budget=3 * size) as (cache, _):
        assert cache.find("", with_question(prefixes[0].ids, 9)) is not None
    with cached(tmp_path, budget=3 * size) as (cache, store):
        store.save(prefixes[3], SYSTEM)
        wait_for(lambda: store.stats().num_written == 1)
        assert store.stats().num_bytes == 3 * size == sum(file.stat().st_size for file in files(tmp_path))
        known = [number for number, prefix in enumerate(prefixes) if store.longest("", with_question(prefix.ids, 9))]
        assert known == [0, 2, 3]
    with cached(tmp_path, budget=2 * size) as (_, store):
        assert store.stats().num_files == len(files(tmp_path)) == 2
    with cached(tmp_path, budget=size - 1) as (_, store):
        store.save(prefixes[4], SYSTEM)
        wait_for(lambda: store.stats().num_dropped == 1)
        assert files(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_takes_no_more_is_left_alone(
    tmp_path: Path, call: str, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = make(tokens(SYSTEM, 1), EVERYONE), make(tokens(SYSTEM, 2), EVERYONE)
    keep(tmp_path, old)

    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    with cached(tmp_path) as (cache, store):
        monkeypatch.setattr(os, call, refuse)
        cache.put(new)
        wait_for(lambda: store.stats().read_only)
        cache.put(make(tokens(SYSTEM, 3), EVERYONE))
        for prefix in (old, new):
            assert cache.find("", with_question(prefix.ids, 9)) is not None
    monkeypatch.undo()
    assert len(warnings(caplog)) == 1
    assert len(list(tmp_path.iterdir())) == 3, "key, lock and the old one"
    with cached(tmp_path) as (cache, store):
        assert cache.find("", with_question(old.ids, 9)) is not None
        assert not store.stats().read_only, "after a restart it is tried again"


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_a_read_that_fails_is_a_miss(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes = [make(tokens(SYSTEM, seed)) for seed in (1, 2)]
    for prefix in prefixes:
        keep(tmp_path, prefix)

    def fail(*_args: object) -> int:
        raise error

    with cached(tmp_path) as (cache, store):
        monkeypatch.setattr(os, "preadv", fail)
        for prefix in prefixes:
            assert cache.find("", with_question(prefix.ids, 9)) is None
        monkeypatch.undo()
        assert store.stats().num_failures == 2
    assert len(warnings(caplog)) == 1
    with cached(tmp_path) as (cache, _):
        assert cache.find("", with_question(prefixes[0].ids, 9)) is not None, "the file was not at fault"


def test_a_file_that_was_tidied_away_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = make(tokens(SYSTEM, 1))
    file = keep(tmp_path, prefix)
    with cached(tmp_path) as (cache, store):
        file.unlink()
        assert cache.find("", with_question(prefix.ids, 9)) is None
        assert store.stats().num_bytes == 0
    assert warnings(caplog) == []


def test_a_slow_disk_never_holds_up_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cached(tmp_path) as (cache, store):
        gate = threading.Event()
        monkeypatch.setattr(os, "fsync", lambda _: gate.wait(60))
        begin = time.monotonic()
        for seed in range(MAX_QUEUED + 3):
            cache.put(make(tokens(SYSTEM, seed), EVERYONE))
        assert time.monotonic() - begin < 5
        assert store.stats().num_dropped == 3
        gate.set()
    assert len(files(tmp_path)) == MAX_QUEUED


WRITE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from edge.engine.prefix import MIN_TOKENS, begins_with, longest_match, reusable_length
from edge.engine.prefix_cache import EVERYONE, Prefix
from edge.engine.prefix_store import PrefixStore
store = PrefixStore.open(Path(sys.argv[1]), 1 << 30, b"a model")
rng = np.random.default_rng(int(sys.argv[2]))
while True:
    ids = rng.integers(0, 50_000, 400)
    cache = (ids[None, None, :, None] * np.ones((8, 8, 1, 32))).astype(np.float32)
    store.save(Prefix(EVERYONE, ids, cache), 400)
"""


def kill_while_writing(folder: Path, seed: int, after_s: float) -> None:
    """Have a process write, wait for one more file, and then kill it in the midst of the next ones."""
    written = len(files(folder))
    line = [sys.executable, "-c", WRITE_FOR_EVER, str(folder), str(seed)]
    with subprocess.Popen(line, cwd=ROOT) as process:
        wait_for(lambda: len(files(folder)) > written, seconds=60)
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)


def test_a_killed_writer_leaves_whole_files_only(tmp_path: Path) -> None:
    rng = random.Random(4)
    for seed in range(4):
        kill_while_writing(tmp_path, seed, rng.uniform(0, 0.05))
    written = len(files(tmp_path))
    assert written >= 4
    with cached(tmp_path, budget=1 << 30) as (cache, store):
        assert store.stats().num_files == written
        assert not list(tmp_path.glob("*.tmp"))
        for stored in list(store._files.values()):
            found = cache.find("", with_question(stored.head.ids.astype(np.int64), 1))
            assert found is not None
            assert (found[0].cache == found[0].ids[None, None, :, None]).all()
        assert store.stats().num_unusable == 0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    export_tiny(folder, tiny.qwen2_config(max_position_embeddings=1024))
    return folder / "bundle"


@contextmanager
def serving(bundle: Path, store: Path | None) -> Iterator[Service]:
    env = {"QWEDGE_ENGINE_THREADS": "1"} | ({"QWEDGE_ENGINE_PREFIX_STORE": str(store)} if store else {})
    service = load_service(bundle, verify_bundle(bundle), load_settings(env=env))
    service.start()
    try:
        yield service
    finally:
        service.stop()


def answer(service: Service, prompt: str) -> tuple[str, int]:
    """The greedy text, and how many of the prompt's tokens were known."""
    client = Client(service, prompt, max_tokens=16, ignore_eos=True)
    end = client.end()
    assert isinstance(end, Finished)
    return client.text, end.timings.num_cached_tokens


def test_a_restarted_service_knows_the_shared_beginning_and_answers_the_same(bundle: Path, tmp_path: Path) -> None:
    system = random.Random(3).randbytes(400).decode("latin-1").encode("ascii", "replace").decode()
    prompts = [f"{system}{question}" for question in ("What is this?", "And that?", "Why?")]
    with serving(bundle, None) as service:
        expected = [answer(service, prompt)[0] for prompt in prompts]
    with serving(bundle, tmp_path / "store") as service:
        assert [answer(service, prompts[0]), answer(service, prompts[1])] == [(expected[0], 0), (expected[1], 400)]
    for _ in range(2):
        with serving(bundle, tmp_path / "store") as service:
            assert answer(service, prompts[2]) == (expected[2], 400)


def test_the_shared_beginning_is_on_disk_long_before_the_end(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "store") as service:
        for question in ("What is this?", "And that?"):
            answer(service, "s" * 400 + question)
        wait_for(lambda: bool(files(tmp_path / "store")))
        # What a process that is killed now leaves.
        shutil.copytree(tmp_path / "store", tmp_path / "left")
    with serving(bundle, tmp_path / "left") as service:
        assert answer(service, "s" * 400 + "Why?")[1] == 400


def test_another_bundle_never_gets_these_keys_and_values(bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with open_checkpoint(
        tiny.write_folder(tmp_path / "checkpoint", tiny.qwen2_config(max_position_embeddings=1024), seed=9)
    ) as checkpoint:
        export_bundle(checkpoint, tmp_path / "other", RECIPES["fp32"], progress=Silent())
    with serving(bundle, store) as service:
        for question in ("What is this?", "And that?"):
            answer(service, "s" * 400 + question)
    assert len(files(store)) == 1
    with serving(tmp_path / "other", store) as service:
        assert answer(service, "s" * 400 + "Why?")[1] == 0
    assert files(store) == []
