"""One step of the graph: its arrays, bound to the session, the cache and the adapters.

A step is either some tokens of one slot (:class:`Append`) or one token for each row of the window (:class:`Decode`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge.engine.kv_cache import KVPool
from edge.engine.lora import ActiveAdapters, StepAdapters
from edge.engine.rows import UNIT, appended, round_up
from edge.engine.session import Inputs, Outputs, Session, Step

Reads = Literal["last", "every", "hidden"]
"""What is wanted of a step: logits of the last position or of every one, or hidden states instead."""


class SlotCaches(Protocol):
    """Keys and values by slot: what an append needs of a pool."""

    layers: int

    def slot(self, layer: int, slot: int) -> tuple[Any, Any]:
        """Keys and values of one slot [1, kv_heads, context, head_dim] each, in place, as the session binds them."""
        ...


Pool_co = TypeVar("Pool_co", bound=SlotCaches, covariant=True)


@dataclass(frozen=True)
class Binder(Generic[Pool_co]):
    """What steps are bound to."""

    session: Session
    pool: Pool_co
    adapters: ActiveAdapters
    logits: NDArray[np.float32]
    """Where every step leaves them [most positions of a step, padded_vocab]."""
    hidden: NDArray[np.float32]
    """Where a step that is asked for them leaves its hidden states [most positions of a step, hidden_size]."""

    def step(self, inputs: Inputs, outputs: Outputs, caches: Sequence[tuple[Any, Any]]) -> tuple[Step, StepAdapters]:
        """A step and its adapters; see :meth:`edge.engine.session.Session.step`."""
        step = self.session.step(inputs, outputs, caches)
        return step, StepAdapters(self.adapters, step, len(inputs["input_ids"]))


@dataclass(frozen=True)
class Sizes:
    """How large steps are."""

    prefill_chunk: int
    """Most tokens of a step that reads a prompt."""
    score_chunk: int
    """Most tokens of one that returns logits of all of them."""
    row_multiple: int
    """Rows that a decode step has a multiple of, for a row to be rounded alike in every one."""
    filler: int
    """The slot of rows that only fill a step up."""

    def padded(self, num_tokens: int) -> int:
        """Rows that a decode step of so many tokens takes."""
        return round_up(num_tokens, self.row_multiple)


class Runs(Protocol):
    """A step that appends to one slot."""

    def run(self, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """What :meth:`Append.run` returns."""
        ...


class PromptSteps:
    """The steps that append several tokens to a slot, made when they are first wanted.

    Args:
        append: makes such a step of a slot, the most tokens that it takes, and what is wanted of it.
        sizes: of the steps.
    """

    def __init__(self, append: Callable[[int, int, Reads], Runs], sizes: Sizes) -> None:
        self._prefill = cache(lambda slot: append(slot, sizes.prefill_chunk, "last"))
        self._score = cache(lambda slot: append(slot, sizes.score_chunk, "every"))
        self._embed = cache(lambda slot: append(slot, sizes.prefill_chunk, "hidden"))

    def prefill(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Logits [1, padded_vocab] of the last position; see :class:`edge.engine.engine.Engine` for all of these."""
        return self._prefill(slot).run(ids, past)

    def score(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Logits [n, padded_vocab] of all positions."""
        return self._score(slot).run(ids, past)

    def embed(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Hidden states [n, hidden_size] of all positions."""
        return self._embed(slot).run(ids, past)


class Steps(PromptSteps):
    """The steps bound to a session."""

    def __init__(self, binder: Binder[KVPool], sizes: Sizes) -> None:
        super().__init__(lambda slot, most, reads: Append(binder, slot, most=most, reads=reads), sizes)
        self._pool = binder.pool
        self._sizes = sizes
        self._decode = cache(lambda num_tokens: Decode(binder, num_tokens, sizes.padded(num_tokens)))
        self.drop_mapped = binder.session.drop_mapped

    def decode(self, slots: Sequence[int], ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n, padded_vocab] of tokens of any slots."""
        count = len(ids)
        slots = [*slots, *[self._sizes.filler] * (self._sizes.padded(count) - count)]
        return self._decode(count).run(self._pool.show(slots), slots, ids, past)


class Append:
    """Several tokens for one slot: shapes follow the number of tokens, the cache stays bound.

    Some tokens that nobody needs may follow them, which the next append overwrites: without them the last ones would be
    rounded in another way than all others (``edge.engine.rows``). So a token of a prompt has the same bits however the
    prompt is cut.

    Args:
        most: most tokens of a step.
        reads: what is wanted of a step: logits of the last position or of every one, or hidden states instead.
        fills_up: whether such tokens may follow.
    """

    def __init__(
        self, binder: Binder[SlotCaches], slot: int, *, most: int, reads: Reads, fills_up: bool = True
    ) -> None:
        self._reads = reads
        self._fills_up = fills_up
        self._slots = np.array([slot])
        self._ids = np.zeros((1, most + UNIT), np.int64)
        self._seqlens = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._indices = np.arange(most if reads == "every" else 1, dtype=np.int64)
        self._results = binder.hidden if reads == "hidden" else binder.logits[: len(self._indices)]
        self._bound = (0, 0)
        inputs: Inputs = {
            "input_ids": self._ids,
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
            "logits_indices": self._indices,
        }
        caches = [binder.pool.slot(layer, slot) for layer in range(binder.pool.layers)]
        outputs = {} if reads == "hidden" else {"logits": self._results}
        self.step, self._adapters = binder.step(inputs, outputs, caches)

    def run(self, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Logits or hidden states [n, ...] of all positions, or logits [1, padded_vocab] of the last."""
        n = len(ids)
        padded = appended(n, past) if self._fills_up else n
        if (n, padded) != self._bound:
            self._rebind(n, padded)
        self._ids[0, :n] = ids
        self._ids[0, n:padded] = 0
        self._seqlens[0] = past + padded - 1
        self._total[()] = past + padded
        if self._reads == "last":
            self._indices[0] = n - 1
        self._adapters.update(self._slots)
        self.step.run()
        return self._results[:n]

    def _rebind(self, n: int, padded: int) -> None:
        self.step.bind_input("input_ids", self._ids[:, :padded])
        if self._reads == "every":
            self.step.bind_input("logits_indices", self._indices[:n])
            self.step.bind_output("logits", self._results[:n])
        elif self._reads == "hidden":
            self.step.bind_output("hidden_states", self._results[None, :padded])
        self._bound = n, padded


class Decode:
    """Decode of the window's first rows: every shape is fixed, only other adapters are ever bound again.

    Args:
        num_tokens: rows with a token.
        rows: all rows; those beyond only fill the step up, since kernels round the last one of an odd number of rows in
            a way of its own.
    """

    def __init__(self, binder: Binder[KVPool], num_tokens: int, rows: int) -> None:
        self._num_tokens = num_tokens
        self._slots = np.zeros(rows, np.int64)
        self._ids = np.zeros((rows, 1), np.int64)
        self._seqlens = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits = binder.logits[:num_tokens]
        self._indices = np.zeros(num_tokens, np.int64)
        inputs: Inputs = {
            "input_ids": self._ids,
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
            "logits_indices": self._indices,
        }
        caches = [binder.pool.rows(layer, rows) for layer in range(binder.pool.layers)]
        self.step, self._adapters = binder.step(inputs, {"logits": self._logits}, caches)

    def run(
        self, places: Sequence[int], slots: Sequence[int], ids: Sequence[int], past: Sequence[int]
    ) -> NDArray[np.float32]:
        """Token i goes to row ``places[i]``, which shows ``slots[i]``; its logits come back as row i."""
        wanted, fillers = places[: self._num_tokens], places[self._num_tokens :]
        self._slots[places] = slots
        self._ids[wanted, 0] = ids
        self._seqlens[wanted] = past
        self._seqlens[fillers] = 0
        self._total[()] = max(past) + 1
        self._indices[:] = wanted
        self._adapters.update(self._slots)
        self.step.run()
        return self._logits
