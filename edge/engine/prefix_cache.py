"""Keys and values of past prompts, kept so that a shared beginning is not prefilled again.

A system prompt that many requests share, or a conversation that grows, starts with tokens whose keys and values were
computed before. Entries belong to an identity: nobody gets a hit on what somebody else sent, so timing tells nothing
about other clients' prompts (CVE-2025-46570 is what happens otherwise). What the operator shares with
:data:`~edge.engine.prefix.EVERYONE` is there for all. Least recently used entries go first.

With a :class:`~edge.engine.prefix_store.PrefixStore` some entries outlive the process. To disk goes

- at once: what is for everyone;
- at once: the beginning that two requests had in common before they went different ways, and no more of them;
- in the end: entries that were used, such as a conversation that went on.

So a conversation is not written anew with each of its turns, and a prompt that came only once never is.

Entries with a state are of use as a whole only: none replaces another, and :class:`edge.slots.Slots` makes one for the
beginning that two requests have in common.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from edge.engine.prefix import (
    EVERYONE,
    MIN_TOKENS,
    Prefix,
    begins_with,
    is_everyones,
    longest_match,
    owners,
    replaces,
    suits,
)
from edge.engine.prefix_store import PrefixStore

__all__ = ["EVERYONE", "MIN_TOKENS", "Prefix", "PrefixCache"]


@dataclass
class _Entry:
    prefix: Prefix
    used: bool
    """Whether a request, or one that this entry grew from, began with it."""


class PrefixCache:
    """The entries, by identity and token ids. One thread uses it.

    Args:
        budget_bytes: most memory for all entries; 0 keeps nothing.
        store: what outlives the process; closed with the cache.
    """

    def __init__(self, budget_bytes: int, store: PrefixStore | None = None) -> None:
        self._budget = budget_bytes
        self._store = store
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # least recently used first
        self._keys = count()
        self.num_bytes = 0
        """Memory of all entries."""

    def find(self, identity: str, ids: NDArray[np.int64]) -> tuple[Prefix, int] | None:
        """The entry that shares the longest beginning with the prompt ``ids`` [n], and that beginning's length.

        An entry on disk is read if it spares enough more than those in memory. Trouble with it is not the caller's.
        """
        best = self._longest(identity, ids)
        if stored := self._load(identity, ids, longer_than=best[1] if best else 0):
            return stored
        if best is None:
            return None
        key, length = best
        self._entries.move_to_end(key)
        entry = self._entries[key]
        entry.used = True
        if self._store is not None and length < len(entry.prefix.ids):
            self._store.save(entry.prefix, length)
        return entry.prefix, length

    def has(self, identity: str, ids: NDArray[np.int64]) -> bool:
        """Whether an entry that ``identity`` may use makes one with ``ids`` superfluous."""
        mine = owners(identity)
        usable = (entry.prefix for entry in self._entries.values() if entry.prefix.identity in mine)
        return any(replaces(prefix.ids, ids, is_whole=prefix.state is not None) for prefix in usable)

    def shared_length(self, identity: str, ids: NDArray[np.int64]) -> int:
        """How many tokens the prompt ``ids`` [n] shares with an entry in memory, even one that is no hit."""
        mine = owners(identity)
        usable = ((key, entry.prefix.ids) for key, entry in self._entries.items() if entry.prefix.identity in mine)
        match = longest_match(usable, ids)
        return match[1] if match else 0

    def wants(self, num_tokens: int, num_bytes: int) -> bool:
        """Whether an entry of that size is worth making."""
        return num_tokens >= MIN_TOKENS and num_bytes <= self._budget

    def put(self, prefix: Prefix, *, shared: bool = False) -> None:
        """Add an entry in place of those it extends, and drop the oldest until the budget holds.

        Args:
            prefix: the entry.
            shared: whether it is known that two requests began with it.
        """
        self._insert(_Entry(prefix, used=shared))
        if self._store is not None and (shared or is_everyones(prefix.identity)):
            self._store.save(prefix, len(prefix.ids))

    def close(self, timeout_s: float = 5.0) -> None:
        """Save what is worth it, as far as ``timeout_s`` seconds allow, and let go of the store; harmless when done."""
        if self._store is not None:
            store, self._store = self._store, None
            store.close([entry.prefix for entry in reversed(self._entries.values()) if entry.used], timeout_s)

    def _longest(self, identity: str, ids: NDArray[np.int64]) -> tuple[int, int] | None:
        """Key and length of the best entry in memory."""
        mine = owners(identity)
        usable = (
            (key, entry.prefix.ids)
            for key, entry in reversed(self._entries.items())
            if entry.prefix.identity in mine and suits(entry.prefix.ids, ids, is_whole=entry.prefix.state is not None)
        )
        return longest_match(usable, ids)

    def _load(self, identity: str, ids: NDArray[np.int64], longer_than: int) -> tuple[Prefix, int] | None:
        """The best entry on disk, brought into memory, if it is so much longer that reading it pays."""
        while self._store is not None and (found := self._store.longest(identity, ids)):
            stored, length = found
            if length < longer_than + MIN_TOKENS:
                return None
            if prefix := self._store.load(stored, identity):
                if self.wants(len(prefix.ids), prefix.num_bytes):
                    self._insert(_Entry(prefix, used=True))
                return prefix, length
        return None

    def _insert(self, entry: _Entry) -> None:
        new = entry.prefix
        for key, old in list(self._entries.items()):
            if old.prefix.identity == new.identity and begins_with(new.ids, old.prefix.ids):
                entry.used = entry.used or old.used
                # What has a state is of use as it is, even if something begins with it.
                if new.state is None or len(new.ids) == len(old.prefix.ids):
                    self._drop(key)
        self._entries[next(self._keys)] = entry
        self.num_bytes += new.num_bytes
        while self.num_bytes > self._budget:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: int) -> None:
        self.num_bytes -= self._entries.pop(key).prefix.num_bytes
