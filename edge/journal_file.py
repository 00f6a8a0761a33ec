"""The journal's file: SQLite set up so that a commit survives a power cut, and what is damaged is set aside.

One process has the file (a locked, private folder), one connection uses it, and nothing else is on disk than the
database and its write-ahead log. A commit is one append and one fsync.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from edge.engine.private_folder import PrivateFolder

log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
FILE: Final = "journal.db"
SET_ASIDE: Final = "journal.damaged.db"
WAL_BYTES: Final = 1 << 20
"""What the log keeps on disk once it has been copied into the database."""
_PAGE_BYTES: Final = 2048
"""Small, as every commit writes whole pages and a request is some hundred bytes."""
_CHECKPOINT_PAGES: Final = 512
_SPARE: Final = 4 << 20
"""Bytes that may lie unused in the file before it is rewritten at the start."""
_SCHEMA: Final = """
CREATE TABLE requests (
    seq INTEGER PRIMARY KEY,      -- in the order of acceptance
    owner TEXT NOT NULL,          -- front end and identity
    id TEXT NOT NULL,             -- the owner's name for the request
    fingerprint BLOB NOT NULL,    -- tells whether a copy asks the same
    starts INTEGER NOT NULL,      -- how often it has begun to run
    delivered INTEGER NOT NULL,   -- whether the outcome is known to have been sent
    accepted_at REAL NOT NULL,    -- wall clock
    boot TEXT NOT NULL,           -- which start of the machine, and seconds since then:
    uptime REAL NOT NULL,         -- setting the time does not change them
    size INTEGER NOT NULL,        -- bytes of the three below
    reply BLOB NOT NULL,          -- where the outcome goes; the front end's own format
    request BLOB,                 -- as received; NULL once it is answered
    outcome BLOB                  -- NULL until it is answered
)
"""
_TYPES: Final = {
    **dict.fromkeys(("owner", "id", "boot"), "('text')"),
    **dict.fromkeys(("starts", "delivered", "size"), "('integer')"),
    **dict.fromkeys(("accepted_at", "uptime"), "('real')"),
    **dict.fromkeys(("fingerprint", "reply"), "('blob')"),
    **dict.fromkeys(("request", "outcome"), "('blob', 'null')"),
}
"""SQLite's names of the types that each column may hold."""
_MOST_SEQ: Final = 1 << 62
_CLOCK_SET: Final = (1_735_689_600.0, 2_524_608_000.0)
"""2025-01-01 to 2050-01-01: a wall clock beyond either was not set yet, or lost its battery (many then begin in 2070 or
2099), and says nothing about how much time passed."""

Statement = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Moment:
    """A point in time that a later process can measure from."""

    wall: float
    """Seconds since 1970, if the clock is set."""
    boot: str
    """Differs between two starts of the machine."""
    uptime: float
    """Seconds since the machine's start, those asleep included."""

    @classmethod
    def now(cls) -> Moment:
        """This moment."""
        return cls(time.time(), _boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME))

    def seconds_to(self, later: Moment) -> float:
        """The time that has passed, never negative: exact until the machine starts anew, then by the wall clock.

        A wall clock that was not set, or was set back, tells nothing: 0 then.
        """
        if self.boot == later.boot:
            return max(0.0, later.uptime - self.uptime)
        begin, end = _CLOCK_SET
        if self.wall < begin or later.wall > end:
            return 0.0
        return max(0.0, later.wall - self.wall)


@dataclass(frozen=True)
class Head:
    """A row without what it holds."""

    seq: int
    owner: str
    id: str
    fingerprint: bytes
    starts: int
    delivered: bool
    accepted: Moment
    size: int
    answered: bool


class DamagedError(Exception):
    """The file is no journal, or not whole."""


class JournalFile:
    """An open file; made by :meth:`open`. Safe to use from any thread.

    Args:
        database: set up for commits that last.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: PrivateFolder | None) -> JournalFile:
        """Open the folder's journal or begin one; without a folder, in memory.

        A damaged one is set aside as :data:`SET_ASIDE`, with a line in the log.

        Raises:
            OSError: the disk refuses.
            sqlite3.Error: likewise.
        """
        if folder is None:
            return cls(_set_up(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)))
        try:
            return cls(_open(folder))
        except (DamagedError, sqlite3.DatabaseError) as error:
            if not is_damage(error):
                raise
            log.error("%s is damaged (%s): set aside as %s; what it held is forgotten", FILE, error, SET_ASIDE)  # noqa: TRY400 - the reason is in the line
        set_aside(folder)
        return cls(_open(folder))

    def commit(self, statements: Iterable[Statement]) -> None:
        """Execute statements as one: when this returns, they survive a power cut; if it raises, none happened.

        Raises:
            sqlite3.Error: the disk refuses, or the file is damaged (:func:`is_damage`).
        """
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                for statement in statements:
                    self._database.execute(*statement)
                self._database.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite may have rolled back already
                    self._database.execute("ROLLBACK")
                raise

    def heads(self) -> list[Head]:
        """All rows in the order of acceptance.

        Raises:
            sqlite3.Error: the file cannot be read.
        """
        columns = "seq, owner, id, fingerprint, starts, delivered, accepted_at, boot, uptime, size, outcome IS NOT NULL"
        with self._lock:
            return [_head(row) for row in self._database.execute(f"SELECT {columns} FROM requests ORDER BY seq")]  # noqa: S608 - constants

    def read(self, seq: int) -> tuple[bytes, bytes | None, bytes | None] | None:
        """A row's reply, request and outcome.

        Raises:
            sqlite3.Error: the file cannot be read.
        """
        with self._lock:
            row: tuple[bytes, bytes | None, bytes | None] | None = self._database.execute(
                "SELECT reply, request, outcome FROM requests WHERE seq = ?", (seq,)
            ).fetchone()
        return row

    def close(self) -> None:
        """Copy the log into the database if the disk takes it, and close both."""
        with self._lock, suppress(sqlite3.Error):
            self._database.close()


def is_damage(error: Exception) -> bool:
    """Whether an error says that the file itself is bad, not that the disk refuses."""
    if isinstance(error, DamagedError):
        return True
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return primary in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def set_aside(folder: PrivateFolder) -> None:
    """Keep a damaged journal, for a person to look at, in place of the one set aside before.

    Raises:
        OSError: the disk refuses.
    """
    for name in (FILE, f"{FILE}-wal"):
        with suppress(FileNotFoundError):
            (folder.path / name).replace(folder.path / name.replace(FILE, SET_ASIDE))


def _open(folder: PrivateFolder) -> sqlite3.Connection:
    path = folder.path / FILE
    # SQLite would make it readable by others.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    _sync_folders(folder.path)
    # psow=0: a commit fills the disk's sector, so that writing the next one cannot damage it.
    database = sqlite3.connect(f"file:{path.absolute().as_uri().removeprefix('file://')}?psow=0", uri=True,
                               isolation_level=None, check_same_thread=False, timeout=0)  # fmt: skip
    try:
        # Alone with the file, SQLite needs no shared memory beside it.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        _set_up(database)
    except BaseException:
        database.close()
        raise
    return database


def _set_up(database: sqlite3.Connection) -> sqlite3.Connection:
    for pragma in (
        f"page_size = {_PAGE_BYTES}", "journal_mode = WAL", "synchronous = FULL", "temp_store = MEMORY",
        "secure_delete = FAST", f"wal_autocheckpoint = {_CHECKPOINT_PAGES}", f"journal_size_limit = {WAL_BYTES}",
    ):  # fmt: skip
        database.execute(f"PRAGMA {pragma}").fetchall()
    version = _number(database, "user_version")
    if version == 0 and not _number(database, "schema_version"):
        database.execute("BEGIN IMMEDIATE")
        database.execute(_SCHEMA)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
    elif version != SCHEMA_VERSION:
        raise DamagedError(f"its format is version {version}, not {SCHEMA_VERSION}")
    elif (verdict := database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise DamagedError(verdict)
    else:
        _check_rows(database)
    if _number(database, "freelist_count") * _number(database, "page_size") > _SPARE:
        database.execute("VACUUM")
    return database


def _check_rows(database: sqlite3.Connection) -> None:
    """Refuse rows that nobody wrote: SQLite knows whether pages fit together, not what belongs in a row.

    Raises:
        DamagedError: a value is of another type than its column, a text is no UTF-8, or a number cannot be counted on.
    """
    wrong = " OR ".join(f"typeof({name}) NOT IN {kinds}" for name, kinds in _TYPES.items())
    odd = f"seq NOT BETWEEN 1 AND {_MOST_SEQ} OR {wrong}"
    if row := database.execute(f"SELECT seq FROM requests WHERE {odd} LIMIT 1").fetchone():  # noqa: S608 - constants
        raise DamagedError(f"row {row[0]} holds what was never written")
    for texts in database.execute("SELECT CAST(owner AS BLOB), CAST(id AS BLOB), CAST(boot AS BLOB) FROM requests"):
        try:
            b" ".join(texts).decode()
        except UnicodeDecodeError:
            raise DamagedError("a row holds text that is no UTF-8") from None


def _number(database: sqlite3.Connection, pragma: str) -> int:
    return int(database.execute(f"PRAGMA {pragma}").fetchone()[0])


def _head(row: tuple[Any, ...]) -> Head:
    seq, owner, name, fingerprint, starts, delivered, wall, boot, uptime, size, answered = row
    accepted = Moment(wall, boot, uptime)
    return Head(seq, owner, name, fingerprint, starts, bool(delivered), accepted, size, bool(answered))


def _sync_folders(path: Path) -> None:
    """Make the names on the way to the file durable, which may be as new as the file itself."""
    for folder in _upwards(path):
        with suppress(PermissionError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _upwards(path: Path) -> Iterator[Path]:
    """A folder and those above it on the same file system."""
    device = path.stat().st_dev
    for folder in (path, *path.absolute().parents):
        if folder.stat().st_dev != device:
            return
        yield folder


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
