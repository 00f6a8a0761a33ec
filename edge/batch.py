"""The sequences that have a slot, and the steps that move them on: one is prefilled in chunks, the others decode."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge.decode_step import Decoding, Share
from edge.energy_shares import EnergyShares
from edge.engine.interface import Engine
from edge.errors import CancelledError, DeadlineError, EngineError, QwedgeError
from edge.prefill_step import Prefilling
from edge.sequence import FinishReason, Sequence, SequenceStatus
from edge.slots import Slots

log = logging.getLogger(__name__)

_EWMA = 0.2
"""Weight of the newest request in the running mean that retry hints and ETAs are made from."""


class Batch:
    """Sequences in prefill and decode. Changed by the engine's thread only; others read what it tells.

    Args:
        engine: computes.
        slots: where the sequences' keys, values and states are.
        prefill_step: reads a chunk of a prompt.
        decode_step: appends a token, or several, to each sequence in decode.
        energy: is told whom each step was for.
    """

    def __init__(
        self, engine: Engine, slots: Slots, prefill_step: Prefilling, decode_step: Decoding, energy: EnergyShares
    ) -> None:
        self._engine = engine
        self._slots = slots
        self._prefill_step = prefill_step
        self._decode_step = decode_step
        self._energy = energy
        self._running: list[Sequence] = []
        self.prefilling: Sequence | None = None
        """The sequence in prefill; to be set before :meth:`begin`."""
        self.num_preempted = 0
        """How often a sequence had to give its slot back."""
        self.mean_s = 1.0
        """How long sequences took of late, from the first step to the last; seconds."""

    @property
    def active(self) -> list[Sequence]:
        """The sequences that have a slot."""
        prefilling = self.prefilling
        return [*self._running, *([prefilling] if prefilling else [])]

    def begin(self, sequence: Sequence) -> None:
        """Give the sequence in prefill a slot."""
        sequence.status = SequenceStatus.PREFILL
        if is_new := sequence.started_at is None:
            sequence.started_at = time.monotonic()
        self._guarded(partial(self._slots.take, sequence, self._running), [sequence])
        if is_new and sequence.status is SequenceStatus.PREFILL:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            sequence.consumer.started()

    def make_room(self) -> Iterator[Sequence]:
        """Take the slot of the youngest sequences until the next step fits into the budget; the oldest always fits.

        Returns:
            Those that lost their slot; they will be computed again, and go on where they were.
        """
        step = self._engine.rows + (self._engine.prefill_chunk if self.prefilling else 0)
        while len(active := self.active) > 1 and not self._slots.holds(active, step):
            youngest = max(active, key=lambda sequence: sequence.started_at or 0.0)
            self._preempt(youngest)
            yield youngest

    def step(self) -> None:
        """At least one token for every sequence in decode, then one chunk of the one in prefill."""
        if self._running:
            self._guarded(self._decode, self._running)
        if self.prefilling is not None:
            self._guarded(partial(self._prefill, self.prefilling), [self.prefilling])

    def fail(self, sequence: Sequence, error: QwedgeError) -> None:
        """End a sequence, whether it has a slot or not."""
        if sequence.slot >= 0 and isinstance(error, CancelledError | DeadlineError):
            self._slots.keep(sequence)  # the work was sound, only nobody waited for the end
        self._release(sequence)
        sequence.consumer.failed(error, sequence.timings())

    def _preempt(self, sequence: Sequence) -> None:
        self._slots.keep(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        self.num_preempted += 1

    def _prefill(self, sequence: Sequence) -> None:
        """Prefill one chunk; after the last one the first token is there."""
        last = self._prefill_step.run(sequence, shares=bool(self._running))
        self._energy.charge([sequence])
        self._slots.keep_snapshot(sequence)
        if sequence.num_computed_tokens == len(sequence.prompt_ids):
            sequence.prompt_reader = None
            self.prefilling = None
            self._running.append(sequence)
            sequence.status = SequenceStatus.DECODE
            if sequence.max_tokens == 0:
                self._finish(sequence, "length")
            elif not sequence.output_ids:  # else they were generated before the slot was taken away
                self._next_token(sequence, last)

    def _decode(self) -> None:
        """At least one token for every running sequence."""
        shares = self._decode_step.step(self._running)
        self._energy.charge(self._running)
        for share, logits in shares:
            self._guarded(partial(self._take, share, logits), [share.sequence])

    def _take(self, share: Share, logits: NDArray[np.float32]) -> None:
        """Sample the next tokens from the logits [len(share.ids), padded_vocab], as far as guesses are right."""
        sequence = share.sequence
        sequence.num_computed_tokens += len(share.known)
        if not share.is_complete:
            return
        num_right = 0
        for position, row in enumerate(logits[len(share.known) - 1 :]):
            self._next_token(sequence, row)
            guess = share.draft.ids[position : position + 1] if position < share.num_drafted else ()
            if sequence.status is SequenceStatus.FINISHED or (sequence.output_ids[-1],) != guess:
                break
            sequence.num_computed_tokens += 1
            num_right += 1
        self._decode_step.settle(share, num_right)

    def _next_token(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        """Sample from ``logits`` [padded_vocab] and let the token take effect."""
        token = sequence.sampler.sample(logits)
        sequence.output_ids.append(token)
        if sequence.first_token_at is None:
            sequence.first_token_at = time.monotonic()
        if token in sequence.eos_ids:
            self._finish(sequence, "stop")
        elif reason := sequence.consumer.token(token):
            self._finish(sequence, reason)
        elif sequence.num_output_tokens >= sequence.max_tokens or sequence.num_tokens >= self._engine.context_length:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._slots.keep(sequence)
        self._release(sequence)
        timings = sequence.timings()
        total = timings.prefill_s + timings.decode_s
        self.mean_s += _EWMA * (total - self.mean_s)
        sequence.consumer.finished(reason, timings)

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence off its slot, if it has one."""
        if sequence is self.prefilling:
            self.prefilling = None
        elif sequence in self._running:
            self._running.remove(sequence)
        self._slots.give_back(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _guarded(self, work: Callable[[], None], sequences: list[Sequence]) -> None:
        """Run engine work; a failure ends the sequences it was for, and only those."""
        try:
            work()
        except QwedgeError as error:
            failure: QwedgeError = error
        except Exception:  # whatever the engine throws, the service lives on
            log.exception("the engine failed")
            failure = engine_failure()
        else:
            return
        for sequence in list(sequences):
            self.fail(sequence, failure)


def engine_failure() -> EngineError:
    """What is said of an error that is not one of ours."""
    return EngineError("the engine failed on this request", hint="see the server's log; try again")
