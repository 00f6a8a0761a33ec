"""The durable ledger of requests: what was accepted is answered once, whatever happens to process, disk and power.

A front end enters a request before it promises an answer, and the answer before it sends it. After a crash
:meth:`Journal.entries` gives what was promised and not answered, and what was answered and perhaps not sent. A repeated
request finds its answer by :meth:`Journal.find`. Rows are keyed by owner (front end and identity) and request id.

One thread writes. It commits what has gathered meanwhile as one (:mod:`edge.journal_file`) and then calls back, so that
nobody waits for the disk who does not want to, and ten requests at once cost one fsync. Keys and fingerprints are in
memory; rows are read for replays and after a start only. Without a folder the same code works in memory.

While the disk refuses (full, read-only, broken), nothing new is accepted, answers wait to be entered, and the thread
tries again every :data:`PROBE_S` seconds.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge.engine.private_folder import PrivateFolder
from edge.errors import OverloadedError, QwedgeError, UnavailableError
from edge.journal_file import SCHEMA_VERSION, Head, JournalFile, Moment, Statement
from edge.journal_index import IN_MEMORY, Index, Key, Limits, Row

log = logging.getLogger(__name__)

PROBE_S: Final = 2.0
"""Seconds between two attempts while the disk refuses."""
CONNECT_S: Final = 1.0
"""Readers wait so long for a file that is being opened."""
STUCK_S: Final = 5.0
"""Seconds that a commit may take before it counts as a disk that refuses."""
MAX_BATCH: Final = 64
"""Changes committed as one."""
RETRY_S: Final = 5.0
"""When a refused request may come again."""

__all__ = ["IN_MEMORY", "Entry", "Journal", "Key", "Known", "Limits", "Then"]

Then = Callable[[QwedgeError | None], None]
"""Called on the journal's thread when a change is durable, or with the reason why it is refused."""


@dataclass(frozen=True)
class Entry:
    """A request, as a front end enters it and gets it back after a restart."""

    key: Key
    fingerprint: bytes
    """Tells whether a copy asks the same."""
    reply: bytes
    """Where the outcome goes."""
    request: bytes | None
    """What is needed to run it again; None once it is answered."""
    outcome: bytes | None = None
    """None until it is answered."""
    starts: int = 1
    """How often it has begun to run."""
    age_s: float = 0.0
    """Seconds since it was accepted, as far as the clocks tell; never negative."""


@dataclass(frozen=True)
class Known:
    """What the journal holds under a key."""

    fingerprint: bytes
    outcome: bytes | None
    """None until it is answered."""


@dataclass(frozen=True)
class _Change:
    statement: Statement
    apply: Callable[[], None]
    """Brings the index up to date after the commit."""
    then: Then
    waits: bool
    """Kept while the disk refuses; others are refused too."""


class Journal:
    """The ledger between :meth:`open` and :meth:`close`; safe to use from any thread.

    Args:
        folder: for this journal alone; None keeps everything in memory.
        limits: how much is remembered; None: :class:`Limits` as it is, or :data:`IN_MEMORY`.
    """

    def __init__(self, folder: Path | None = None, limits: Limits | None = None) -> None:
        self._path = folder
        self._folder: PrivateFolder | None = None
        self._file: JournalFile | None = None  # changed by the writer only, once it runs
        self._changed = threading.Condition()
        self._changes: deque[_Change] = deque()  # guarded by _changed, like all below
        self._late: list[Statement] = []  # go with the next commit, and cause none
        self._closing = False
        self._index = Index(limits or (IN_MEMORY if folder is None else Limits()))
        self._next_seq = 1
        self._problem: str | None = None
        self._began_at: float | None = None  # the commit that is under way
        self._loaded = False
        self._connecting = False
        self._thread: threading.Thread | None = None

    @property
    def problem(self) -> str | None:
        """Why nothing can be entered now, in words; None where all is well."""
        began_at = self._began_at
        stuck = began_at is not None and time.monotonic() - began_at > STUCK_S
        return self._problem or ("the disk does not answer" if stuck else None)

    def open(self) -> None:
        """Open or begin the file and start the thread; harmless when it is open.

        A disk that refuses is a :attr:`problem`, which may pass, and no error.

        Raises:
            ConfigError: the folder belongs to another user, or others may look into it.
            UnavailableError: another process uses the folder.
        """
        if self._thread is not None:
            return
        self._closing = False
        try:
            self._connect()
        except (OSError, sqlite3.Error) as error:
            self._fail(error)
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Commit what waits, if the disk takes it, and close the file."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._disconnect()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def check(self) -> None:
        """Whether a request could be entered now.

        Raises:
            UnavailableError: the disk refuses.
            OverloadedError: requests without an outcome take all the room.
        """
        if (problem := self.problem) is not None:
            raise _refusal(problem)
        if self._index.full:
            raise OverloadedError("too many stored requests wait", hint="try again later", retry_after_s=RETRY_S)

    def accept(self, entry: Entry, then: Then) -> None:
        """Enter a request whose key is not in use; it is found from now on, and durable when ``then`` is called."""
        now, size = Moment.now(), len(entry.reply) + len(entry.request or b"")
        columns = "seq, owner, id, fingerprint, starts, delivered, accepted_at, boot, uptime, size, reply, request"
        with self._changed:
            seq, self._next_seq = self._next_seq, self._next_seq + 1
            self._index.enter(entry.key, Row(seq, entry.fingerprint, now, size, answered=False))
            values = (
                *(seq, entry.key.owner, entry.key.id, entry.fingerprint, entry.starts, 0),
                *(now.wall, now.boot, now.uptime, size, entry.reply, entry.request),
            )
            insert = f"INSERT INTO requests ({columns}) VALUES ({', '.join('?' * len(values))})"  # noqa: S608 - constants
            self._put(_Change((insert, values), lambda: None, self._undoing(entry.key, then), waits=False))

    def redirect(self, key: Key, reply: bytes, then: Then) -> None:
        """Send a request's outcome elsewhere, after a restart too."""
        self._update(key, "UPDATE requests SET reply = ? WHERE seq = ?", (reply,), lambda: None, then, waits=False)

    def start(self, key: Key, starts: int, then: Then) -> None:
        """Note that a request begins to run for the ``starts``-th time. Waits until the disk takes it."""
        self._update(key, "UPDATE requests SET starts = ? WHERE seq = ?", (starts,), lambda: None, then)

    def settle(self, key: Key, reply: bytes, outcome: bytes | None, then: Then) -> None:
        """Enter a request's outcome, or None to forget the request. Waits until the disk takes it, however long."""
        if outcome is None:
            self._update(key, "DELETE FROM requests WHERE seq = ?", (), lambda: self._index.leave(key), then)
            return
        size = len(reply) + len(outcome)
        answer = "UPDATE requests SET reply = ?, size = ?, request = NULL, outcome = ? WHERE seq = ?"
        self._update(key, answer, (reply, size, outcome), lambda: self._answered(key, size), then)

    def delivered(self, key: Key) -> None:
        """The outcome has arrived: it need not be sent after a restart. Written with the next change."""
        with self._changed:
            if row := self._index.get(key):
                self._late.append(("UPDATE requests SET delivered = 1 WHERE seq = ?", (row.seq,)))

    def find(self, key: Key) -> Known | None:
        """What is held under a key.

        Raises:
            UnavailableError: the file cannot be read.
        """
        with self._changed:
            # A disk that refuses has the file opened anew every few seconds: what is stored can be read in a moment.
            self._changed.wait_for(lambda: not self._connecting, CONNECT_S)
            row, file = self._index.get(key), self._file
        if row is None or not row.answered:
            return None if row is None else Known(row.fingerprint, None)
        if file is None:
            raise _refusal(self._problem or "the journal is closed")
        try:
            stored = file.read(row.seq)
        except sqlite3.Error as error:
            raise _refusal(str(error)) from None
        return None if stored is None else Known(row.fingerprint, stored[2])

    def entries(self) -> list[Entry] | None:
        """Requests without an outcome, and outcomes that may not have arrived; None while the file cannot be read."""
        with self._changed:
            file = self._file
            if file is None or not self._loaded:
                return None
        now = Moment.now()
        try:
            return list(self._entries(file, now))
        except sqlite3.Error as error:
            log.warning("stored requests cannot be read: %s", error)
            return None

    def _entries(self, file: JournalFile, now: Moment) -> Iterator[Entry]:
        for head in file.heads():
            if head.delivered or (stored := file.read(head.seq)) is None:
                continue
            reply, request, outcome = stored
            age_s = head.accepted.seconds_to(now)
            yield Entry(Key(head.owner, head.id), head.fingerprint, reply, request, outcome, head.starts, age_s)

    # --- under _changed ----------------------------------------------------------------------------------------------

    def _update(
        self,
        key: Key,
        sql: str,
        values: tuple[object, ...],
        apply: Callable[[], None],
        then: Then,
        *,
        waits: bool = True,
    ) -> None:
        with self._changed:
            row = self._index.get(key)
            seq = 0 if row is None else row.seq  # forgotten with a damaged file: nothing to update
            self._put(_Change((sql, (*values, seq)), apply, then, waits))

    def _put(self, change: _Change) -> None:
        self._changes.append(change)
        self._changed.notify_all()

    def _undoing(self, key: Key, then: Then) -> Then:
        """``then``, after a refused request has left the index."""

        def finish(error: QwedgeError | None) -> None:
            if error is not None:
                with self._changed:
                    self._index.leave(key)
            then(error)

        return finish

    def _answered(self, key: Key, size: int) -> None:
        self._index.answer(key, size)
        self._late += [_delete(seq) for seq in self._index.forget_oldest(Moment.now())]

    def _take_late(self) -> list[Statement]:
        late, self._late = self._late, []
        return late

    # --- the writer's thread ----------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        while self._wait():
            with self._changed:
                batch = [self._changes.popleft() for _ in range(min(len(self._changes), MAX_BATCH))]
                late = self._take_late()
            try:
                if self._problem is not None:
                    late += [*self._connect(), _PROBE]
                assert self._file is not None
                self._began_at = time.monotonic()
                self._file.commit([*late, *(change.statement for change in batch)])
            except (OSError, sqlite3.Error, QwedgeError) as error:
                self._fail(error)
                self._keep(late, batch)
            else:
                self._succeed(batch)
            finally:
                self._began_at = None

    def _wait(self) -> bool:
        """Until there is something to commit, or it is time to try the disk again; False at the end."""
        with self._changed:
            if self._problem is not None:
                return not self._changed.wait_for(lambda: self._closing, PROBE_S)
            self._changed.wait_for(lambda: self._changes or self._closing)
            return bool(self._changes or self._late)

    def _succeed(self, batch: list[_Change]) -> None:
        with self._changed:
            if self._problem is not None:
                log.warning("requests can be stored again")
                self._problem = None
            for change in batch:
                change.apply()
        for change in batch:
            _tell(change.then, None)

    def _fail(self, error: Exception) -> None:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if self._problem is None:
            log.error("requests cannot be stored: %s; new ones are refused until the disk takes them", reason)
        self._problem = reason

    def _keep(self, late: list[Statement], batch: list[_Change]) -> None:
        """After a failed commit: what can wait waits, the rest is refused."""
        with self._changed:
            self._late = [*(statement for statement in late if statement is not _PROBE), *self._late]
            self._changes.extendleft(change for change in reversed(batch) if change.waits)
            refusal = _refusal(self._problem or "")
        for change in batch:
            if not change.waits:
                _tell(change.then, refusal)

    def _connect(self) -> list[Statement]:
        """Open the file, anew if it was open: after an error nothing is known of what the old connection believes.

        Returns:
            What makes the file agree with what was promised.
        """
        with self._changed:
            self._connecting = True
        try:
            self._disconnect()
            if self._path is not None and self._folder is None:
                self._folder = PrivateFolder.open(self._path)
            file = JournalFile.open(self._folder)
            try:
                heads = file.heads()
            except BaseException:
                file.close()
                raise
            with self._changed:
                self._file = file
                return self._agree(heads)
        finally:
            with self._changed:
                self._connecting = False
                self._changed.notify_all()

    def _disconnect(self) -> None:
        with self._changed:
            file, self._file = self._file, None
        if file is not None:
            file.close()

    def _agree(self, heads: list[Head]) -> list[Statement]:
        """Bring index and file together: at first by the file; later by the index, which knows what was promised."""
        stored = {head.seq for head in heads}
        if self._loaded:
            return [_delete(seq) for seq in stored - self._index.keep_only(stored)]
        for head in heads:
            self._index.enter(Key(head.owner, head.id), Row.of(head))
        self._next_seq = max(stored, default=0) + 1
        self._loaded = True
        return []


def _delete(seq: int) -> Statement:
    return "DELETE FROM requests WHERE seq = ?", (seq,)


def _tell(then: Then, error: QwedgeError | None) -> None:
    try:
        then(error)
    except Exception:  # one front end's fault must not reach the others
        log.exception("a front end failed to take the journal's word")


def _refusal(problem: str) -> UnavailableError:
    hint = "free or repair the disk that holds the journal; or go without it: mqtt.journal = none"
    return UnavailableError(f"requests cannot be stored: {problem}", hint=hint, retry_after_s=RETRY_S)


_PROBE: Final[Statement] = (f"PRAGMA user_version = {SCHEMA_VERSION}", ())
"""Changes nothing and is written all the same."""
