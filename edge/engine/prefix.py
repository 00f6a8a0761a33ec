"""A prefix: tokens at the beginning of a prompt, and the keys and values that the model made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

EVERYONE = "*"
"""The identity whose prefixes all others may use: what the operator chose to share (``qwedge serve --warm``).

No front end ever gives it to a client, so nothing that a client sent gets there.
"""
_ADAPTED = "\0"
"""Between an identity and the adapter; no front end gives out an identity that holds it."""
MIN_TOKENS = 32
"""Shorter beginnings are not worth an entry: prefilling them takes a tenth of a second."""

Ids = NDArray[np.int64] | NDArray[np.int32]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Prefix:
    """Tokens and what the model made of them."""

    identity: str
    """Whose it is; nobody else gets a hit on it, but for :data:`EVERYONE`'s."""
    ids: NDArray[np.int64]  # [num_tokens]
    cache: NDArray[Any]  # [2 * layers, kv_heads, num_tokens, head_dim], in the type of the bundle's KV cache
    state: NDArray[np.float32] | None = None
    """What linear attention remembers of exactly these tokens: the prefix is then of use as a whole only."""

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.cache.nbytes + self.ids.nbytes + (0 if self.state is None else self.state.nbytes)


def owned_by(identity: str, adapter: str = "") -> str:
    """The identity of what ``identity`` computes with an adapter (its digest): keys and values are others with each."""
    return f"{identity}{_ADAPTED}{adapter}" if adapter else identity


def owners(identity: str) -> tuple[str, str]:
    """Whose prefixes an identity may use: its own and everyone's, computed with its adapter."""
    return identity, EVERYONE + "".join(identity.partition(_ADAPTED)[1:])


def is_everyones(identity: str) -> bool:
    """Whether what belongs to ``identity`` is for all."""
    return identity == owners(identity)[1]


def common_length(a: Ids, b: Ids) -> int:
    """Length of the common beginning of two rows of token ids."""
    shorter = min(len(a), len(b))
    # Most pairs differ early: a look at the first few tokens spares the comparison of thousands.
    for end in (min(MIN_TOKENS, shorter), shorter):
        different = np.flatnonzero(a[:end] != b[:end])
        if len(different):
            return int(different[0])
    return shorter


def reusable_length(known: Ids, ids: Ids) -> int:
    """How many tokens of the prompt ``ids`` [n] an entry with the tokens ``known`` can stand for; 0 if not worth it.

    The last token is never taken from an entry: the model has to see it to say what follows.
    """
    length = min(common_length(known, ids), len(ids) - 1)
    return length if length >= MIN_TOKENS else 0


def begins_with(known: Ids, ids: Ids) -> bool:
    """Whether the tokens ``known`` begin with all of ``ids``."""
    length = len(ids)
    if not 0 < length <= len(known):
        return length == 0
    # The last token first: it differs in nearly every case.
    return bool(known[length - 1] == ids[-1] and (known[:length] == ids).all())


def suits(known: Ids, ids: Ids, *, is_whole: bool) -> bool:
    """Whether an entry with the tokens ``known`` may stand for the beginning of the prompt ``ids``.

    Args:
        known: tokens of the entry.
        ids: of the prompt.
        is_whole: whether the entry is of use as a whole only.
    """
    # A last token by itself would be rounded in another way than among others (docs/architecture.md).
    return not is_whole or (len(known) < len(ids) - 1 and begins_with(ids, known))


def replaces(known: Ids, ids: Ids, *, is_whole: bool) -> bool:
    """Whether an entry with the tokens ``known`` makes one with ``ids``, of the same owner, superfluous."""
    if is_whole:
        return 0 <= len(ids) - len(known) < MIN_TOKENS and begins_with(ids, known)
    return begins_with(known, ids)


def longest_match(candidates: Iterable[tuple[Key, Ids]], ids: Ids) -> tuple[Key, int] | None:
    """The candidate that :func:`reusable_length` is largest of, the first among equals, and that length."""
    best: tuple[Key, int] | None = None
    length = MIN_TOKENS - 1
    for key, known in candidates:
        # Only a candidate that goes on rightly where the best one so far ends can be longer.
        if length < min(len(known), len(ids) - 1) and known[length] == ids[length]:
            reusable = reusable_length(known, ids)
            if reusable > length:
                best, length = (key, reusable), reusable
    return best
