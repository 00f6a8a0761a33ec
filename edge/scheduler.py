"""Which sequence the engine works on next: admission, chunked prefill, batched decode, deadlines and cancellation.

One thread owns the engine. Each turn of its loop decodes at least one token for every running sequence, then prefills
one chunk of one waiting sequence, so that a long prompt delays running streams by one chunk at most; where the machine
must be spared, it pauses after that (``edge.throttle``). A sequence keeps its slot of the KV pool from prefill to its
end, unless the pool's budget is used up: then the youngest gives its slot back and waits at the head of the queue.

The scheduler sees token ids only. What a token means (text, stop strings) is the consumer's business, see
``edge.sequence.Consumer``; the service is the one that implements it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge.decode_step import Decoding, Share
from edge.energy_shares import EnergyShares
from edge.engine.interface import Engine
from edge.engine.prefix_cache import PrefixCache
from edge.errors import CancelledError, DeadlineError, EngineError, OverloadedError, QwedgeError, UnavailableError
from edge.prefill_step import Prefilling
from edge.scheduler_stats import Place, SchedulerStats, SlotStats
from edge.sequence import FinishReason, Sequence, SequenceStatus
from edge.slots import Slots
from edge.throttle import Throttle

__all__ = ["Place", "Scheduler", "SchedulerStats", "SlotStats"]

log = logging.getLogger(__name__)

_EWMA = 0.2
"""Weight of the newest request in the running mean that retry hints and ETAs are made from."""
_REST_AFTER_S = 1.0
"""Seconds of idleness after which memory that was in use is given back."""


class Scheduler:
    """Runs sequences on an engine, in order of arrival.

    Args:
        engine: the engine; after :meth:`start` only the scheduler's thread touches it.
        max_queue: sequences that may wait; one more is refused with :class:`OverloadedError`.
        prefixes: keys and values of past prompts; None keeps none.
        draft_tokens: most tokens guessed in one step (``edge.engine.speculation``); 0 never guesses.
        kv_cache_bytes: most memory of sequences in prefill and decode, keys, values and states; None = as much as the
            slots hold.
        sleep_after_s: seconds without work after which the weights leave the memory; None = never.
        energy_j: joules that the machine has used since some beginning; None where nothing measures them.
        throttle: slows the engine down; started and stopped by the scheduler. None never does.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue: int,
        prefixes: PrefixCache | None = None,
        draft_tokens: int = 0,
        kv_cache_bytes: int | None = None,
        sleep_after_s: float | None = None,
        energy_j: Callable[[], float | None] = lambda: None,
        throttle: Throttle | None = None,
    ) -> None:
        self._engine = engine
        self._throttle = throttle or Throttle()
        self._energy = EnergyShares(energy_j)  # the engine's thread only
        self._decoding = Decoding(engine, draft_tokens)  # the engine's thread only
        self._slots = Slots(engine, prefixes or PrefixCache(0), kv_cache_bytes)  # the engine's thread only
        self._prefilling_step = Prefilling(engine, self._slots, self._throttle)  # the engine's thread only
        self._sleep_after_s = sleep_after_s
        self._max_queue = max_queue
        self._changed = threading.Condition()
        self._waiting: deque[Sequence] = deque()  # guarded by _changed
        self._accepting = False  # guarded by _changed
        self._unload = False  # guarded by _changed: the weights are to leave the memory with the next idleness
        self._stopping = False  # guarded by _changed
        self._running: list[Sequence] = []  # the engine's thread only, like all below
        self._prefilling: Sequence | None = None
        self._asleep = False
        self._num_preempted = 0
        self._progress_at = time.monotonic()
        self._mean_request_s = 1.0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the engine's thread and accept sequences."""
        with self._changed:
            self._accepting = True
        self._throttle.start()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new sequences, give the present ones ``drain_s`` seconds, cancel the rest, end the thread."""
        with self._changed:
            self._accepting = False
            self._changed.notify_all()
            self._changed.wait_for(self._idle, timeout=drain_s)
            self._stopping = True
            self._changed.notify_all()
        self._throttle.stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._slots.close()

    def submit(self, *sequences: Sequence) -> None:
        """Queue sequences, all or none.

        Raises:
            OverloadedError: the queue has no room for them.
            UnavailableError: the scheduler is stopping.
        """
        with self._changed:
            self.check_room(len(sequences))
            position = len(self._waiting)
            if self._idle():
                # The engine's thread has not woken up yet: idleness must not count as a lack of progress.
                self._progress_at = time.monotonic()
            self._waiting.extend(sequences)
            for place, sequence in enumerate(sequences, start=position):
                sequence.consumer.queued(place, self._eta_s(place))
            self._changed.notify_all()

    def check_room(self, num_sequences: int = 1) -> None:
        """Whether so many sequences would be queued now, before anything is done for them.

        Raises:
            OverloadedError: the queue has no room for them.
            UnavailableError: the scheduler is stopping.
        """
        with self._changed:
            if not self._accepting:
                raise UnavailableError("the server is shutting down", hint="try again when it is back", retry_after_s=5)
            position = len(self._waiting)
            if position + num_sequences > self._max_queue:
                retry = max(1.0, self._eta_s(position) / 2)
                raise OverloadedError(f"{position} requests are waiting", hint="try again later", retry_after_s=retry)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence at the next step; harmless when it has ended already."""
        with self._changed:
            sequence.cancelled = True
            self._changed.notify_all()

    def unload(self) -> None:
        """Let the weights leave the memory as soon as nothing is left to do; the next sequence brings them back."""
        with self._changed:
            self._unload = not self._asleep
            self._changed.notify_all()

    def stats(self) -> SchedulerStats:
        """The state right now; cheap enough for every health check."""
        with self._changed:
            active = self._active()
            busy = bool(active or self._waiting)
            return SchedulerStats(
                num_waiting=len(self._waiting),
                num_running=len(active),
                slots=self._engine.slots,
                max_queue=self._max_queue,
                accepting=self._accepting,
                seconds_since_progress=time.monotonic() - self._progress_at if busy else 0.0,
                asleep=self._asleep,
                kv_bytes=self._slots.num_bytes(active),
                num_preempted=self._num_preempted,
                num_drafted=self._decoding.num_drafted,
                num_accepted=self._decoding.num_accepted,
                throttle=self._throttle.state,
            )

    def busy_slots(self) -> list[SlotStats]:
        """What the occupied slots work on right now."""
        now = time.monotonic()
        with self._changed:
            return [
                SlotStats(
                    slot=sequence.slot,
                    status=_phase(sequence),
                    num_prompt_tokens=len(sequence.prompt_ids),
                    num_cached_tokens=sequence.num_cached_tokens,
                    num_output_tokens=sequence.num_output_tokens,
                    tokens_per_s=sequence.timings().tokens_per_s,
                    age_s=now - sequence.submitted_at,
                )
                for sequence in self._active()
                if sequence.slot >= 0
            ]

    def queue(self) -> list[Place]:
        """Where the waiting sequences are, in their order."""
        with self._changed:
            return [self._place(sequence, position) for position, sequence in enumerate(self._waiting)]

    def find(self, request_id: str) -> Place | None:
        """Where a request is, of several sequences the one that is furthest; None where it is not known any more."""
        with self._changed:
            places = [(None, sequence) for sequence in self._active()] + list(enumerate(self._waiting))
            found = (self._place(sequence, at) for at, sequence in places if sequence.request_id == request_id)
            return next(found, None)

    def _place(self, sequence: Sequence, position: int | None) -> Place:
        return Place(
            status="waiting" if position is not None else _phase(sequence),
            position=position,
            eta_s=None if position is None else self._eta_s(position),
            age_s=time.monotonic() - sequence.submitted_at,
            num_prompt_tokens=len(sequence.prompt_ids),
            num_output_tokens=sequence.num_output_tokens,
        )

    def _active(self) -> list[Sequence]:
        """The sequences that have a slot."""
        prefilling = self._prefilling
        return [*self._running, *([prefilling] if prefilling else [])]

    def _idle(self) -> bool:
        return not (self._waiting or self._running or self._prefilling)

    def _eta_s(self, position: int) -> float:
        """Seconds until a sequence at ``position`` may start, from the mean duration of recent requests."""
        return (position + 1) * self._mean_request_s / self._engine.slots

    def _run(self) -> None:
        while self._await_work():
            try:
                if self._asleep:
                    self._wake()
                self._step()
            except Exception as error:  # whatever goes wrong, the service lives on
                if not isinstance(error, QwedgeError):
                    log.exception("the engine failed")
                    error = _failure()
                self._fail_all(error)
        self._fail_all(UnavailableError("the server shut down", hint="send the request again", retry_after_s=5))

    def _await_work(self) -> bool:
        """Wait until there is something to do; false when the scheduler stops."""
        with self._changed:
            self._changed.notify_all()  # stop() waits for idleness
            is_idle = self._idle()
        if is_idle:
            self._throttle.end()
            self._wait_idle()
            self._throttle.begin()
            self._progress_at = time.monotonic()
            self._energy.begin()
        with self._changed:
            return not self._stopping

    def _wait_idle(self) -> None:
        """Give memory back the longer nothing comes: first what steps have used, then the weights.

        Giving back takes up to 50 ms, in which others may submit: so it holds no lock.
        """
        if self._called_within(_REST_AFTER_S):
            return
        self._engine.rest()
        if not self._asleep:
            after_s = self._sleep_after_s
            if self._called_within(None if after_s is None else max(0.0, after_s - _REST_AFTER_S)):
                return
            log.info("idle: the weights leave the memory")
            self._engine.sleep()
            with self._changed:
                self._asleep, self._unload = True, False
        self._called_within(None)

    def _called_within(self, timeout_s: float | None) -> bool:
        """Whether work comes, or the scheduler is to stop, within that time (None: for ever) and before an unload."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._unload or not self._idle(), timeout_s)
            return self._stopping or not self._idle()

    def _wake(self) -> None:
        began = time.monotonic()
        self._engine.wake()
        self._asleep = False
        log.info("the weights are back after %.2f s", time.monotonic() - began)

    def _step(self) -> None:
        """One turn: drop what must end, decode all running sequences, prefill one chunk, pause where that is due."""
        began = time.monotonic()
        self._reap(began)
        self._admit()
        self._make_room()
        if self._running:
            self._guarded(self._decode, self._running)
        if self._prefilling is not None:
            self._guarded(self._prefill, [self._prefilling])
        self._progress_at = time.monotonic()
        self._throttle.rest(self._progress_at - began)

    def _reap(self, now: float) -> None:
        """End cancelled and late sequences, wherever they are."""
        with self._changed:
            ended = [sequence for sequence in self._waiting if _verdict(sequence, now)]
            for sequence in ended:
                self._waiting.remove(sequence)
        for sequence in [*ended, *self._active()]:
            if error := _verdict(sequence, now):
                self._fail(sequence, error)
        if ended:
            self._announce_positions()

    def _admit(self) -> None:
        """Move the oldest waiting sequence into prefill when there is a slot, and room in the budget."""
        if self._prefilling is not None or not self._slots.any_free:
            return
        with self._changed:
            if not self._waiting or not self._slots.has_room(self._active(), self._waiting[0]):
                return
            sequence = self._waiting.popleft()
            self._prefilling = sequence
        sequence.status = SequenceStatus.PREFILL
        if is_new := sequence.started_at is None:
            sequence.started_at = time.monotonic()
        self._guarded(partial(self._slots.take, sequence, self._running), [sequence])
        if is_new and sequence.status is SequenceStatus.PREFILL:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            sequence.consumer.started()
        self._announce_positions()

    def _make_room(self) -> None:
        """Take the slot of the youngest sequences until the next step fits into the budget; the oldest always fits."""
        step = self._engine.rows + (self._engine.prefill_chunk if self._prefilling else 0)
        while len(active := self._active()) > 1 and not self._slots.holds(active, step):
            self._preempt(max(active, key=lambda sequence: sequence.started_at or 0.0))

    def _preempt(self, sequence: Sequence) -> None:
        """Send a sequence back to the head of the queue; it will be computed again, and go on where it was."""
        self._slots.keep(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        self._num_preempted += 1
        with self._changed:
            self._waiting.appendleft(sequence)

    def _announce_positions(self) -> None:
        with self._changed:
            for position, sequence in enumerate(self._waiting):
                if sequence.started_at is None:
                    sequence.consumer.queued(position, self._eta_s(position))

    def _prefill(self) -> None:
        """Prefill one chunk; after the last one the first token is there."""
        sequence = self._prefilling
        assert sequence is not None
        last = self._prefilling_step.run(sequence, shares=bool(self._running))
        self._energy.charge([sequence])
        self._slots.keep_snapshot(sequence)
        if sequence.num_computed_tokens == len(sequence.prompt_ids):
            sequence.prompt_reader = None
            self._prefilling = None
            self._running.append(sequence)
            sequence.status = SequenceStatus.DECODE
            if sequence.max_tokens == 0:
                self._finish(sequence, "length")
            elif not sequence.output_ids:  # else they were generated before the slot was taken away
                self._next_token(sequence, last)

    def _decode(self) -> None:
        """At least one token for every running sequence."""
        shares = self._decoding.step(self._running)
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
        self._decoding.settle(share, num_right)

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
        self._mean_request_s += _EWMA * (total - self._mean_request_s)
        sequence.consumer.finished(reason, timings)

    def _fail(self, sequence: Sequence, error: QwedgeError) -> None:
        if sequence.slot >= 0 and isinstance(error, CancelledError | DeadlineError):
            self._slots.keep(sequence)  # the work was sound, only nobody waited for the end
        self._release(sequence)
        sequence.consumer.failed(error, sequence.timings())

    def _fail_all(self, error: QwedgeError) -> None:
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for sequence in [*self._active(), *waiting]:
            self._fail(sequence, error)

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence off its slot, if it has one."""
        if sequence is self._prefilling:
            self._prefilling = None
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
            failure = _failure()
        else:
            return
        for sequence in list(sequences):
            self._fail(sequence, failure)


def _phase(sequence: Sequence) -> Literal["prefill", "decode"]:
    return "prefill" if sequence.status is SequenceStatus.PREFILL else "decode"


def _failure() -> EngineError:
    return EngineError("the engine failed on this request", hint="see the server's log; try again")


def _verdict(sequence: Sequence, now: float) -> QwedgeError | None:
    if sequence.cancelled:
        return CancelledError("the request was cancelled")
    if sequence.deadline is not None and now >= sequence.deadline:
        return DeadlineError("the deadline passed", hint="allow more time, ask for fewer tokens, or send it later")
    return None
