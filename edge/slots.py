"""Who has which slot of the KV pool, what a sequence finds in it, and what stays of it afterwards."""

from __future__ import annotations

import logging
from collections.abc import Sequence as List

from edge.engine.interface import Engine
from edge.engine.prefix import Prefix, reusable_length
from edge.engine.prefix_cache import PrefixCache
from edge.sequence import Sequence

log = logging.getLogger(__name__)

_HEADROOM_TOKENS = 64
"""Tokens that every sequence should have room for before another one is admitted, lest it be sent back at once."""


class Slots:
    """Hands the engine's slots out, within a budget of keys and values. The engine's thread only.

    Args:
        engine: whose slots they are.
        prefixes: keys and values of past prompts; closed with the slots.
        budget_bytes: most keys and values of all sequences with a slot; None = as much as the slots hold.
    """

    def __init__(self, engine: Engine, prefixes: PrefixCache, budget_bytes: int | None) -> None:
        self._engine = engine
        self._prefixes = prefixes
        most = engine.slots * engine.context_length
        self._budget_tokens = most if budget_bytes is None else min(most, budget_bytes // engine.bytes_per_token)
        self._free = list(range(engine.slots))

    @property
    def any_free(self) -> bool:
        """Whether a sequence can take one."""
        return bool(self._free)

    def has_room(self, active: List[Sequence], sequence: Sequence) -> bool:
        """Whether the budget allows for one more than the ``active`` ones; for the first one it always does."""
        needed = _num_tokens(active) + sequence.num_tokens + _HEADROOM_TOKENS * (len(active) + 1)
        return not active or needed <= self._budget_tokens

    def holds(self, active: List[Sequence], more: int) -> bool:
        """Whether the budget allows for so many more tokens."""
        return _num_tokens(active) + more <= self._budget_tokens

    def num_bytes(self, active: List[Sequence]) -> int:
        """Keys and values of sequences."""
        return _num_tokens(active) * self._engine.bytes_per_token

    def take(self, sequence: Sequence, running: List[Sequence]) -> None:
        """Give a sequence a slot, with as much of its prompt as is known already.

        Args:
            sequence: that is to be prefilled.
            running: sequences in decode, whose keys and values are as good as those of past ones.
        """
        sequence.slot = self._free.pop()
        self._engine.use_adapter(sequence.slot, sequence.adapter)
        if sequence.prompt_reader is None:
            sequence.num_computed_tokens = self._reuse(sequence, running)

    def keep(self, sequence: Sequence) -> None:
        """Remember a sequence's keys and values before its slot is given away."""
        length = sequence.num_computed_tokens
        if not sequence.is_reusable or not self._prefixes.wants(length, length * self._engine.bytes_per_token):
            return
        ids = sequence.computed_ids()
        if self._prefixes.has(sequence.identity, ids):
            return
        try:
            self._prefixes.put(Prefix(sequence.identity, ids, self._engine.read_slot(sequence.slot, length)))
        except MemoryError:
            log.warning("no memory to keep a prefix of %d tokens", length)

    def give_back(self, sequence: Sequence) -> None:
        """Take a sequence's slot, if it has one."""
        if sequence.slot >= 0:
            self._engine.release_slot(sequence.slot)
            self._free.append(sequence.slot)
            sequence.slot = -1

    def close(self) -> None:
        """Save what is to outlive the process."""
        self._prefixes.close()

    def _reuse(self, sequence: Sequence, running: List[Sequence]) -> int:
        """Put the longest known beginning of a prompt into its slot; returns its length."""
        mine = [other for other in running if other.identity == sequence.identity]
        lengths = [reusable_length(other.computed_ids(), sequence.prompt_ids) for other in mine]
        longest = max(lengths, default=0)
        found = self._prefixes.find(sequence.identity, sequence.prompt_ids)
        if found and found[1] > longest:
            prefix, longest = found
            self._engine.write_slot(sequence.slot, prefix.cache, longest)
        elif longest:
            self._engine.copy_slot(mine[lengths.index(longest)].slot, sequence.slot, longest)
        return longest


def _num_tokens(sequences: List[Sequence]) -> int:
    return sum(sequence.num_computed_tokens for sequence in sequences)
