"""What is in memory of the journal: keys, fingerprints, sizes, and which rows have to go."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Final

from edge.journal_file import Head, Moment


@dataclass(frozen=True)
class Key:
    """Names a request."""

    owner: str
    """Front end and identity, such as ``mqtt:hmi-3``: nobody finds another's request."""
    id: str


@dataclass(frozen=True)
class Limits:
    """How much is remembered. The oldest outcomes go first; a request without an outcome never goes."""

    rows: int = 10_000
    bytes: int = 64 << 20
    """Of requests and outcomes."""
    age_s: float = 7 * 24 * 3600.0
    """Looked at when something is written: an idle device writes nothing."""


IN_MEMORY: Final = Limits(rows=1024, bytes=8 << 20)
"""What is remembered without a folder."""


@dataclass(frozen=True)
class Row:
    """A row without what it holds."""

    seq: int
    fingerprint: bytes
    accepted: Moment
    size: int
    answered: bool

    @classmethod
    def of(cls, head: Head) -> Row:
        """From the file."""
        return cls(head.seq, head.fingerprint, head.accepted, head.size, head.answered)


class Index:
    """The rows by key, in the order of acceptance. Whoever uses it from several threads holds a lock.

    Args:
        limits: how much is remembered.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._rows: OrderedDict[Key, Row] = OrderedDict()
        self._num_bytes = 0
        self._num_open_bytes = 0

    @property
    def full(self) -> bool:
        """Whether requests without an outcome take all the room."""
        return self._num_open_bytes > self._limits.bytes

    def get(self, key: Key) -> Row | None:
        """A key's row."""
        return self._rows.get(key)

    def enter(self, key: Key, row: Row) -> None:
        """Add a row as the newest."""
        self._rows[key] = row
        self._count(row, 1)

    def leave(self, key: Key) -> None:
        """Forget a row, if there is one."""
        if row := self._rows.pop(key, None):
            self._count(row, -1)

    def answer(self, key: Key, size: int) -> None:
        """A request, if it is there, has an outcome and takes ``size`` bytes now."""
        if row := self._rows.get(key):
            self._count(row, -1)
            self._rows[key] = replace(row, size=size, answered=True)
            self._count(self._rows[key], 1)

    def forget_oldest(self, now: Moment) -> list[int]:
        """Keep within the limits; returns the numbers of the rows that went."""
        gone: list[int] = []
        while (key := self._oldest_answered()) is not None and self._is_too_much(self._rows[key], now):
            gone.append(self._rows[key].seq)
            self.leave(key)
        return gone

    def keep_only(self, seqs: set[int]) -> set[int]:
        """Forget all rows of other numbers; returns the numbers that are left."""
        for key in [key for key, row in self._rows.items() if row.seq not in seqs]:
            self.leave(key)
        return {row.seq for row in self._rows.values()}

    def _oldest_answered(self) -> Key | None:
        return next((key for key, row in self._rows.items() if row.answered), None)

    def _is_too_much(self, row: Row, now: Moment) -> bool:
        crowded = len(self._rows) > self._limits.rows or self._num_bytes > self._limits.bytes
        return crowded or row.accepted.seconds_to(now) > self._limits.age_s

    def _count(self, row: Row, sign: int) -> None:
        self._num_bytes += sign * row.size
        self._num_open_bytes += 0 if row.answered else sign * row.size
