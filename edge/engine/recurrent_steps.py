"""Steps of a model with layers of linear attention, whose states lie beside the KV cache (docs/adr/0008).

Nothing may fill a step of such a model up, as it would get into the state: a prompt is read in even numbers of tokens
up to its end, and the rows that fill a decode step up have no state. Several tokens of one sequence in a decode step
are one row for linear attention and a row each for full attention, as in ``edge.engine.steps``: so each of them has the
very bits that it has by itself. Their state goes into a row of its own, and the one before them stays until the slot's
next step tells whether they were right.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edge.engine.kv_cache import KVPool
from edge.engine.session import Inputs, Step
from edge.engine.state_pool import StatePool
from edge.engine.steps import Append, Binder, Decode, PromptSteps, Reads, Sizes


class RecurrentSteps(PromptSteps):
    """The steps bound to a session, made when they are first wanted.

    Args:
        binder: what they are bound to.
        sizes: of steps.
        states: of the slots.
    """

    def __init__(self, binder: Binder[KVPool], sizes: Sizes, states: StatePool) -> None:
        super().__init__(lambda slot, most, reads: _Append(binder, states, slot, most=most, reads=reads), sizes)
        self._pool = binder.pool
        self._sizes = sizes
        self._states = states
        self._decode = cache(lambda num_tokens, first: _decode(binder, sizes, states, num_tokens, first))
        self._verify = cache(lambda num_tokens: _Verify(binder, states, num_tokens))
        self._padded_vocab = binder.logits.shape[1]
        self.drop_mapped = binder.session.drop_mapped

    def decode(self, slots: Sequence[int], ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n, padded_vocab] of tokens of any slots: a step for the slots with one token, one for each other."""
        groups: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            groups.setdefault(slot, []).append(i)
        if len(groups) == len(slots):
            return self._decode_each(slots, ids, past)
        if len(groups) == 1:
            return self._decode_several(slots[0], ids, past)
        logits = np.empty((len(ids), self._padded_vocab), np.float32)
        for part in _parts(groups.values()):
            logits[part] = self.decode(*([values[i] for i in part] for values in (slots, ids, past)))
        return logits

    def _decode_each(self, slots: Sequence[int], ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """One token for each of some slots."""
        for slot, length in zip(slots, past, strict=True):
            self._states.seek(slot, length)
        count = len(slots)
        shown = [*slots, *[self._sizes.filler] * (self._sizes.padded(count) - count)]
        first, places = self._states.arrange(slots)
        # What fills a step up comes last: the graph gives a state to as many rows as there are states.
        places += range(count, len(shown))
        self._pool.show_at(places, shown)
        logits = self._decode(count, first).run(places, shown, ids, past)
        for slot in slots:
            self._states.appended(slot, 1)
        return logits

    def _decode_several(self, slot: int, ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """Several tokens for one slot, which can be taken back."""
        assert list(past) == list(range(past[0], past[0] + len(ids)))
        self._pool.show([slot] * len(ids))
        return self._verify(len(ids)).run(slot, ids, past[0])


def _decode(binder: Binder[KVPool], sizes: Sizes, states: StatePool, num_tokens: int, first: int) -> Decode:
    """A step over as many states, in place, from the row ``first`` on."""
    decode = Decode(binder, num_tokens, sizes.padded(num_tokens))
    _bind(decode.step, states, (first, first), num_tokens)
    return decode


def _parts(groups: Collection[list[int]]) -> list[list[int]]:
    """What goes into a step each: the tokens that are alone in their group together, the others by group."""
    several = [group for group in groups if len(group) > 1]
    alone = [group[0] for group in groups if len(group) == 1]
    return [*several, alone] if alone else several


class _Append:
    """Several tokens for one slot, whose state is changed in place."""

    def __init__(self, binder: Binder[KVPool], states: StatePool, slot: int, *, most: int, reads: Reads) -> None:
        self._append = Append(binder, slot, most=most, reads=reads, fills_up=False)
        self._states = states
        self._slot = slot
        self._row = -1

    def run(self, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """What :meth:`edge.engine.steps.Append.run` returns."""
        row = self._states.seek(self._slot, past)
        if row != self._row:
            _bind(self._append.step, self._states, (row, row), 1)
            self._row = row
        result = self._append.run(ids, past)
        self._states.appended(self._slot, len(ids))
        return result


class _Verify:
    """Several tokens of one slot, each as a row of the window; their state is written beside the one before them."""

    def __init__(self, binder: Binder[KVPool], states: StatePool, num_tokens: int) -> None:
        self._states = states
        self._slots = np.zeros(1, np.int64)
        self._ids = np.zeros((1, num_tokens), np.int64)
        self._seqlens = np.zeros(num_tokens, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits = binder.logits[:num_tokens]
        inputs: Inputs = {
            "input_ids": self._ids,
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
            "logits_indices": np.arange(num_tokens),
        }
        self._indices = inputs["logits_indices"]  # bound by its address: it has to live
        caches = [binder.pool.rows(layer, num_tokens) for layer in range(binder.pool.layers)]
        self._step, self._adapters = binder.step(inputs, {"logits": self._logits}, caches)

    def run(self, slot: int, ids: Sequence[int], past: int) -> NDArray[np.float32]:
        """Logits [n, padded_vocab] of all tokens."""
        rows = self._states.seek(slot, past), self._states.branch(slot)
        _bind(self._step, self._states, rows, 1)
        self._slots[0] = slot
        self._ids[0] = ids
        self._seqlens[:] = range(past, past + len(ids))
        self._total[()] = past + len(ids)
        self._adapters.update(self._slots)
        self._step.run()
        self._states.appended(slot, len(ids))
        return self._logits


def _bind(step: Step, states: StatePool, rows: tuple[int, int], count: int) -> None:
    """Let a step read ``count`` states from the first of two rows on, and write them from the second on."""
    for name, array in states.rows(rows[0], count).items():
        step.bind_input(f"past_{name}", array)
    for name, array in states.rows(rows[1], count).items():
        step.bind_output(f"present_{name}", array)
