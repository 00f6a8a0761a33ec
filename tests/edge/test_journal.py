"""The journal: what it was told survives, it stays bounded, and a disk that refuses or a damaged file ends nothing."""

from __future__ import annotations

import errno
import logging
import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import edge.journal
from edge.errors import ConfigError, OverloadedError, UnavailableError
from edge.journal import Entry, Journal, Key, Known, Limits
from edge.journal_file import FILE, SET_ASIDE, WAL_BYTES, JournalFile, Moment
from tests.edge.journals import settled
from tests.serving import wait_for

Open = Callable[..., Journal]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal"


@pytest.fixture
def open_journal(folder: Path) -> Iterator[Open]:
    """Open the folder's journal; all end with the test."""
    opened: list[Journal] = []

    def make(limits: Limits | None = None, path: Path | None = folder) -> Journal:
        journal = Journal(path, limits)
        journal.open()
        opened.append(journal)
        return journal

    yield make
    for journal in opened:
        journal.close()


def entry(number: int, request: bytes = b"question") -> Entry:
    return Entry(Key("mqtt:hmi", str(number)), b"fingerprint", b"reply", request)


def answer(journal: Journal, number: int, outcome: bytes = b"answer") -> None:
    """Enter a request and its answer."""
    new = entry(number)
    assert settled(journal.accept, new) is None
    assert settled(journal.settle, new.key, b"reply", outcome) is None


def found(journal: Journal, number: int) -> bytes | None:
    known = journal.find(entry(number).key)
    return None if known is None else known.outcome


# --- what it holds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_request_is_found_without_and_with_its_answer(open_journal: Open, folder: Path, in_memory: bool) -> None:
    journal = open_journal(path=None if in_memory else folder)
    assert journal.find(entry(1).key) is None
    assert settled(journal.accept, entry(1)) is None
    assert journal.find(entry(1).key) == Known(b"fingerprint", None)
    assert settled(journal.settle, entry(1).key, b"reply", b"answer") is None
    assert journal.find(entry(1).key) == Known(b"fingerprint", b"answer")
    assert journal.find(Key("mqtt:other", "1")) is None
    assert journal.problem is None


def test_what_is_not_kept_is_forgotten(open_journal: Open) -> None:
    journal = open_journal()
    assert settled(journal.accept, entry(1)) is None
    assert settled(journal.settle, entry(1).key, b"reply", None) is None
    assert journal.find(entry(1).key) is None
    assert journal.entries() == []


def test_after_a_restart_it_knows_what_is_unanswered_and_what_may_not_have_arrived(open_journal: Open) -> None:
    journal = open_journal()
    for number in (1, 2, 3, 4):
        assert settled(journal.accept, entry(number, b"question %d" % number)) is None
    assert settled(journal.start, entry(4).key, 2) is None
    assert settled(journal.redirect, entry(4).key, b"elsewhere") is None
    for number in (1, 2):
        assert settled(journal.settle, entry(number).key, b"newest", b"answer %d" % number) is None
    journal.delivered(entry(1).key)
    journal.close()
    again = open_journal()
    entries = {each.key.id: each for each in again.entries() or []}
    assert list(entries) == ["2", "3", "4"]
    assert (entries["2"].outcome, entries["2"].reply, entries["2"].request) == (b"answer 2", b"newest", None)
    assert (entries["3"].request, entries["3"].starts, entries["3"].outcome) == (b"question 3", 1, None)
    assert (entries["4"].reply, entries["4"].starts) == (b"elsewhere", 2)
    assert all(0 <= each.age_s < 10 for each in entries.values())
    assert found(again, 1) == b"answer 1"
    answer(again, 5)
    assert found(again, 5) == b"answer"


def test_what_was_confirmed_survives_a_kill(folder: Path) -> None:
    script = f"""
import os, threading
from pathlib import Path
from edge.journal import Entry, Journal, Key
journal = Journal(Path({str(folder)!r}))
journal.open()
told = threading.Event()
for number in range(20):
    key = Key("mqtt:hmi", str(number))
    journal.accept(Entry(key, b"f", b"r", b"question"), lambda error: None)
    journal.settle(key, b"r", b"answer", lambda error: told.set())
    told.wait()
    told.clear()
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == -9
    journal = Journal(folder)
    journal.open()
    assert [found(journal, number) for number in range(20)] == [b"answer"] * 20
    journal.close()


def test_changes_that_come_together_are_one_commit(open_journal: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal()
    gate, sizes = threading.Event(), []
    commit = JournalFile.commit

    def counted(file: JournalFile, statements: list[tuple[str, tuple[object, ...]]]) -> None:
        sizes.append(len(statements))
        gate.wait(60)
        commit(file, statements)

    monkeypatch.setattr(JournalFile, "commit", counted)
    told = threading.Barrier(2)
    journal.accept(entry(0), lambda _error: None)
    wait_for(lambda: sizes == [1])
    for number in range(1, 11):
        journal.accept(entry(number), (lambda _error: told.wait(60)) if number == 10 else (lambda _error: None))
    gate.set()
    told.wait(60)
    assert sizes == [1, 10]


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_the_oldest_answers_are_forgotten_by_number_and_never_what_is_unanswered(open_journal: Open) -> None:
    journal = open_journal(Limits(rows=3))
    assert settled(journal.accept, entry(0)) is None
    for number in range(1, 6):
        answer(journal, number)
    assert journal.find(entry(0).key) == Known(b"fingerprint", None)
    assert [found(journal, number) for number in range(1, 6)] == [None] * 3 + [b"answer"] * 2
    answer(journal, 6)
    journal.close()
    assert [each.key.id for each in open_journal().entries() or []] == ["0", "5", "6"]


def test_the_oldest_answers_are_forgotten_by_size_and_the_file_stays_small(open_journal: Open, folder: Path) -> None:
    limit = 1 << 20
    journal = open_journal(Limits(bytes=limit))
    for number in range(150):
        answer(journal, number, bytes(40_000))
    assert found(journal, 149) == bytes(40_000)
    assert found(journal, 100) is None
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < 1.5 * limit + 2 * WAL_BYTES


def test_old_answers_are_forgotten(open_journal: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(Limits(age_s=100))
    answer(journal, 1)
    now = Moment.now()
    later = Moment(now.wall, now.boot, now.uptime + 101)
    monkeypatch.setattr(Moment, "now", lambda: later)
    answer(journal, 2)
    assert (found(journal, 1), found(journal, 2)) == (None, b"answer")


def test_unanswered_requests_have_a_limit_of_their_own(open_journal: Open) -> None:
    journal = open_journal(Limits(bytes=10_000))
    for number in range(3):
        journal.check()
        assert settled(journal.accept, entry(number, bytes(4000))) is None
    with pytest.raises(OverloadedError):
        journal.check()
    assert settled(journal.settle, entry(0).key, b"", None) is None
    journal.check()


def test_few_bytes_are_written_for_a_request_and_none_when_idle(open_journal: Open) -> None:
    journal = open_journal()
    before = written()
    for number in range(100):
        answer(journal, number, bytes(1000))
        journal.delivered(entry(number).key)
    per_request = (written() - before) / 100
    assert per_request <= 24_000
    before = written()
    time.sleep(1.0)
    assert written() == before


def written() -> int:
    """Bytes that this process has sent to disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


# --- time -------------------------------------------------------------------------------------------------------------

NOON = 1_800_000_000.0


@pytest.mark.parametrize(
    ("accepted", "now", "age_s"),
    [
        (Moment(NOON, "a", 50), Moment(NOON + 10, "a", 60), 10),
        (Moment(NOON, "a", 50), Moment(NOON + 1e9, "a", 60), 10),
        (Moment(NOON, "a", 50), Moment(NOON - 1e9, "a", 60), 10),
        (Moment(NOON, "a", 50), Moment(NOON + 30, "b", 5), 30),
        (Moment(NOON, "a", 50), Moment(NOON - 30, "b", 5), 0),
        (Moment(0, "a", 50), Moment(NOON, "b", 5), 0),
        (Moment(NOON, "a", 50), Moment(0, "b", 5), 0),
        (Moment(NOON, "a", 50), Moment(4_070_908_800, "b", 5), 0),  # 2099: a clock without a battery
    ],
)
def test_time_passes_whatever_happens_to_the_clock(accepted: Moment, now: Moment, age_s: float) -> None:
    assert accepted.seconds_to(now) == age_s


# --- the folder and the file ------------------------------------------------------------------------------------------


def test_nobody_else_can_read_it(open_journal: Open, folder: Path) -> None:
    answer(open_journal(), 1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert {path.name for path in folder.iterdir()} == {"lock", FILE, f"{FILE}-wal"}


def test_a_folder_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="open to other users"):
        Journal(folder).open()


def test_two_processes_cannot_share_it(open_journal: Open, folder: Path) -> None:
    open_journal()
    with pytest.raises(UnavailableError, match="another process"):
        Journal(folder).open()


def damage_head(file: Path) -> None:
    file.write_bytes(b"not a database at all" * 500)


def damage_end(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def damage_version(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()


@pytest.mark.parametrize("damage", [damage_head, damage_end, damage_version])
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(
    open_journal: Open, folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    journal = open_journal()
    for number in range(30):
        answer(journal, number, bytes(500))
    journal.close()
    damage(folder / FILE)
    damaged = (folder / FILE).read_bytes()
    again = open_journal()
    assert again.problem is None
    assert again.entries() == []
    answer(again, 1)
    assert found(again, 1) == b"answer"
    assert (folder / SET_ASIDE).read_bytes() == damaged
    assert f"set aside as {SET_ASIDE}" in caplog.text


@pytest.mark.parametrize(
    "wrong", ["boot = CAST(x'ff' AS TEXT)", "uptime = 'x'", "reply = 1", "starts = 1.5", f"seq = {(1 << 63) - 1}"]
)
def test_rows_that_nobody_wrote_are_damage(open_journal: Open, folder: Path, wrong: str) -> None:
    journal = open_journal()
    answer(journal, 1)
    journal.close()
    with closing(sqlite3.connect(folder / FILE)) as database:
        database.execute(f"UPDATE requests SET {wrong}")
        database.commit()
    again = open_journal()
    assert again.problem is None
    assert again.entries() == []
    answer(again, 2)
    assert found(again, 2) == b"answer"
    assert (folder / SET_ASIDE).exists()


def test_any_damage_leaves_a_journal_that_works(open_journal: Open, folder: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    journal = open_journal()
    for number in range(40):
        answer(journal, number, bytes(2000))
    journal.close()
    whole = (folder / FILE).read_bytes()
    for _ in range(15):
        damaged = bytearray(whole)
        at = chance.randrange(len(damaged))
        damaged[at : at + chance.choice([1, 8, 512])] = chance.randbytes(chance.choice([1, 8, 512]))
        (folder / FILE).write_bytes(damaged)
        again = open_journal()
        assert settled(again.accept, entry(100)) is None
        assert settled(again.settle, entry(100).key, b"reply", b"answer") is None
        assert found(again, 100) == b"answer"
        again.close()


# --- a disk that refuses ----------------------------------------------------------------------------------------------


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exception]]:
    """While the list holds an error, every commit fails with it."""
    errors: list[Exception] = []
    commit = JournalFile.commit

    def refuse(file: JournalFile, statements: list[tuple[str, tuple[object, ...]]]) -> None:
        if errors:
            raise errors[0]
        commit(file, statements)

    monkeypatch.setattr(JournalFile, "commit", refuse)
    monkeypatch.setattr(edge.journal, "PROBE_S", 0.1)
    yield errors
    errors.clear()


@pytest.mark.parametrize(
    "error", [sqlite3.OperationalError("database or disk is full"), OSError(errno.EIO, "Input/output error")]
)
def test_while_the_disk_refuses_new_requests_are_refused_and_answers_wait(
    open_journal: Open, refusing: list[Exception], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    journal = open_journal()
    assert settled(journal.accept, entry(1)) is None
    refusing.append(error)
    refusal = settled(journal.accept, entry(2))
    assert isinstance(refusal, UnavailableError)
    assert refusal.retry_after_s
    assert "mqtt.journal" in refusal.hint
    with pytest.raises(UnavailableError):
        journal.check()
    assert journal.problem in {"database or disk is full", "Input/output error"}
    assert journal.find(entry(2).key) is None
    answered = threading.Event()
    journal.settle(entry(1).key, b"reply", b"answer", lambda _error: answered.set())
    assert not answered.wait(0.3)
    assert journal.find(entry(1).key) == Known(b"fingerprint", None)
    refusing.clear()
    assert answered.wait(60)
    assert journal.problem is None
    journal.check()
    answer(journal, 2)
    assert (found(journal, 1), found(journal, 2)) == (b"answer", b"answer")
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 2, "one line when it begins, one when it is over"


def test_what_is_stored_can_be_read_while_the_file_is_opened_anew(
    open_journal: Open, refusing: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal()
    answer(journal, 1)
    opening, opened = threading.Event(), JournalFile.open

    def slowly(*arguments: Any) -> JournalFile:
        opening.set()
        time.sleep(0.2)
        return opened(*arguments)

    monkeypatch.setattr(edge.journal, "CONNECT_S", 60)
    monkeypatch.setattr(JournalFile, "open", slowly)
    refusing.append(sqlite3.OperationalError("database or disk is full"))
    assert settled(journal.accept, entry(2)) is not None
    for _ in range(3):
        opening.clear()
        assert opening.wait(60)
        assert found(journal, 1) == b"answer"


def test_a_disk_that_does_not_answer_is_a_problem(open_journal: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.journal, "STUCK_S", 0.1)
    journal, commit, gate = open_journal(), JournalFile.commit, threading.Event()

    def hang(file: JournalFile, statements: list[tuple[str, tuple[object, ...]]]) -> None:
        assert gate.wait(60)
        commit(file, statements)

    monkeypatch.setattr(JournalFile, "commit", hang)
    told = threading.Event()
    journal.accept(entry(1), lambda _error: told.set())
    wait_for(lambda: journal.problem == "the disk does not answer")
    with pytest.raises(UnavailableError):
        journal.check()
    gate.set()
    assert told.wait(60)
    wait_for(lambda: journal.problem is None)
    journal.check()


def test_what_was_refused_is_not_there_even_if_the_disk_took_it(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge.journal, "PROBE_S", 0.1)
    journal, commit = open_journal(), JournalFile.commit

    def take_and_fail(file: JournalFile, statements: list[tuple[str, tuple[object, ...]]]) -> None:
        commit(file, statements)
        monkeypatch.setattr(JournalFile, "commit", commit)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(JournalFile, "commit", take_and_fail)
    assert settled(journal.accept, entry(1)) is not None
    wait_for(lambda: journal.problem is None)
    answer(journal, 2)
    journal.close()
    assert [each.key.id for each in open_journal().entries() or []] == ["2"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_survived_and_room_is_noticed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False).returncode:
        pytest.skip("this sandbox forbids to mount")
    try:
        journal = Journal(disk / "journal")
        journal.open()
        answer(journal, 0)
        (disk / "ballast").write_bytes(bytes(600 << 10))
        accepted = 0
        while settled(journal.accept, entry(accepted + 1, bytes(20_000))) is None:
            accepted += 1
        assert 0 < accepted < 60
        assert journal.problem == "database or disk is full"
        (disk / "ballast").unlink()
        began = time.monotonic()
        wait_for(lambda: journal.problem is None)
        assert time.monotonic() - began < 5
        answer(journal, 1000)
        assert len(journal.entries() or []) == accepted + 2
        journal.close()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_read_only_disk_at_the_start_is_no_reason_to_give_up(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", disk], check=False).returncode:
        pytest.skip("this sandbox forbids to mount")
    try:
        journal = Journal(disk / "journal")
        journal.open()
        assert journal.problem == "Read-only file system"
        assert journal.entries() is None
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        began = time.monotonic()
        wait_for(lambda: journal.problem is None)
        assert time.monotonic() - began < 5
        assert journal.entries() == []
        answer(journal, 1)
        journal.close()
    finally:
        subprocess.run(["umount", disk], check=True)
