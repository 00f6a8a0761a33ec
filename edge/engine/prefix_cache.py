"""Keys and values of past prompts, kept so that a shared beginning is not prefilled again.

A system prompt that many requests share, or a conversation that grows, starts with tokens whose keys and values were
computed before. Entries belong to an identity: nobody gets a hit on what somebody else sent, so timing tells nothing
about other clients' prompts (CVE-2025-46570 is what happens otherwise). Least recently used entries go first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

MIN_TOKENS = 32
"""Shorter beginnings are not worth an entry: prefilling them takes a tenth of a second."""


@dataclass(frozen=True)
class Prefix:
    """Tokens and what the model made of them."""

    identity: str
    ids: NDArray[np.int64]  # [num_tokens]
    cache: NDArray[np.float32]  # [2 * layers, kv_heads, num_tokens, head_dim]

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.cache.nbytes + self.ids.nbytes


class PrefixCache:
    """The entries, by identity and token ids.

    Args:
        budget_bytes: most memory for all entries; 0 keeps nothing.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._entries: OrderedDict[int, Prefix] = OrderedDict()  # least recently used first
        self._keys = count()
        self.num_bytes = 0
        """Memory of all entries."""

    def find(self, identity: str, ids: NDArray[np.int64]) -> tuple[Prefix, int] | None:
        """The entry that shares the longest beginning with ``ids`` [n], and that beginning's length.

        The last two tokens are never taken from an entry: the model has to see one to say what follows, and a token
        by itself would be rounded differently than without the cache.
        """
        best: tuple[int, int] | None = None
        for key, entry in self._entries.items():
            if entry.identity == identity:
                length = min(_common(entry.ids, ids), len(ids) - 2)
                if length >= MIN_TOKENS and (best is None or length >= best[1]):
                    best = key, length
        if best is None:
            return None
        self._entries.move_to_end(best[0])
        return self._entries[best[0]], best[1]

    def has(self, identity: str, ids: NDArray[np.int64]) -> bool:
        """Whether an entry begins with all of ``ids``."""
        mine = (entry for entry in self._entries.values() if entry.identity == identity)
        return any(_common(entry.ids, ids) == len(ids) for entry in mine)

    def wants(self, num_tokens: int, num_bytes: int) -> bool:
        """Whether an entry of that size is worth making."""
        return num_tokens >= MIN_TOKENS and num_bytes <= self._budget

    def put(self, prefix: Prefix) -> None:
        """Add an entry in place of those it extends, and drop the oldest until the budget holds."""
        for key, entry in list(self._entries.items()):
            extends = entry.identity == prefix.identity and _common(entry.ids, prefix.ids) == len(entry.ids)
            if extends:
                self._drop(key)
        self._entries[next(self._keys)] = prefix
        self.num_bytes += prefix.num_bytes
        while self.num_bytes > self._budget:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: int) -> None:
        self.num_bytes -= self._entries.pop(key).num_bytes


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the common beginning."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter
