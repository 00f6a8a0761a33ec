"""Who has which slot of the engine, what a sequence finds in it, and what stays of it afterwards."""

from __future__ import annotations

import logging
from collections.abc import Sequence as List

from edge.engine.interface import Engine
from edge.engine.prefix import Prefix, reusable_length
from edge.engine.prefix_cache import PrefixCache
from edge.sequence import Sequence
from edge.snapshots import chunk_end, snapshot_lengths

log = logging.getLogger(__name__)

_HEADROOM_TOKENS = 64
"""Tokens that every sequence should have room for before another one is admitted, lest it be sent back at once."""


class Slots:
    """Hands the engine's slots out, within a budget of keys, values and states. The engine's thread only.

    Args:
        engine: whose slots they are.
        prefixes: what is known of past prompts; closed with the slots.
        budget_bytes: most memory of all sequences with a slot; None = as much as the slots hold.
    """

    def __init__(self, engine: Engine, prefixes: PrefixCache, budget_bytes: int | None) -> None:
        self._engine = engine
        self._prefixes = prefixes
        most = engine.slots * self._size(engine.context_length)
        self._budget = most if budget_bytes is None else min(most, budget_bytes)
        self._free = list(range(engine.slots))

    @property
    def any_free(self) -> bool:
        """Whether a sequence can take one."""
        return bool(self._free)

    def has_room(self, active: List[Sequence], sequence: Sequence) -> bool:
        """Whether the budget allows for one more than the ``active`` ones; for the first one it always does."""
        headroom = _HEADROOM_TOKENS * (len(active) + 1) * self._engine.bytes_per_token
        return not active or self.num_bytes(active) + self._size(sequence.num_tokens) + headroom <= self._budget

    def holds(self, active: List[Sequence], more: int) -> bool:
        """Whether the budget allows for so many more tokens."""
        return self.num_bytes(active) + more * self._engine.bytes_per_token <= self._budget

    def num_bytes(self, active: List[Sequence]) -> int:
        """Keys, values and states of sequences."""
        return sum(self._size(sequence.num_computed_tokens) for sequence in active)

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
        if self._engine.bytes_per_slot and sequence.is_reusable:
            shared = self._prefixes.shared_length(sequence.identity, sequence.prompt_ids)
            known = sequence.num_computed_tokens
            sequence.snapshots_at = snapshot_lengths(len(sequence.prompt_ids), known, shared)

    def chunk_end(self, sequence: Sequence, most: int) -> int:
        """Up to which prompt token a step of prefill with at most so many tokens goes."""
        past, num_tokens = sequence.num_computed_tokens, len(sequence.prompt_ids)
        if self._engine.bytes_per_slot:
            return chunk_end(past, most, num_tokens, sequence.snapshots_at)
        return min(past + most, num_tokens)

    def keep_snapshot(self, sequence: Sequence) -> None:
        """Remember a prompt as far as it was read, if that is where others may need its state."""
        length = sequence.num_computed_tokens
        if length in sequence.snapshots_at:
            self.keep(sequence, shared=length < sequence.snapshots_at[-1])

    def keep(self, sequence: Sequence, *, shared: bool = False) -> None:
        """Remember what was computed of a sequence before its slot is given away, or its state goes on.

        Args:
            sequence: that has a slot.
            shared: whether another one began like it.
        """
        length = self._engine.kept_length(sequence.slot, sequence.num_computed_tokens)
        # The end of an answer must not displace the prompt's snapshot, which templates make the likelier hit.
        copies = 2 if sequence.snapshots_at and length > sequence.snapshots_at[-1] else 1
        if not sequence.is_reusable or not self._prefixes.wants(length, copies * self._size(length)):
            return
        ids = sequence.computed_ids()[:length]
        if self._prefixes.has(sequence.identity, ids):
            return
        try:
            cache = self._engine.read_slot(sequence.slot, length)
            state = self._engine.read_state(sequence.slot, length)
            self._prefixes.put(Prefix(sequence.identity, ids, cache, state), shared=shared)
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
        # The state of one that runs is further on than where others may begin.
        beginnings = [] if self._engine.bytes_per_slot else running
        mine = [other for other in beginnings if other.identity == sequence.identity]
        lengths = [reusable_length(other.computed_ids(), sequence.prompt_ids) for other in mine]
        longest = max(lengths, default=0)
        found = self._prefixes.find(sequence.identity, sequence.prompt_ids)
        if found and found[1] > longest:
            prefix, longest = found
            self._engine.write_slot(sequence.slot, prefix.cache, longest)
            if prefix.state is not None:
                self._engine.write_state(sequence.slot, prefix.state, longest)
        elif longest:
            self._engine.copy_slot(mine[lengths.index(longest)].slot, sequence.slot, longest)
        return longest

    def _size(self, num_tokens: int) -> int:
        """Bytes that a sequence of so many tokens takes."""
        return num_tokens * self._engine.bytes_per_token + self._engine.bytes_per_slot
