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
from typing import Literal

from edge.batch import Batch, engine_failure
from edge.decode_step import Decoding
from edge.energy_shares import EnergyShares
from edge.engine.interface import Engine
from edge.engine.prefix_cache import PrefixCache
from edge.errors import CancelledError, DeadlineError, OverloadedError, QwedgeError, UnavailableError
from edge.prefill_step import Prefilling
from edge.scheduler_stats import Place, SchedulerStats, SlotStats
from edge.sequence import Sequence, SequenceStatus
from edge.slots import Slots
from edge.throttle import Throttle

__all__ = ["Place", "Scheduler", "SchedulerStats", "SlotStats"]

log = logging.getLogger(__name__)

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
        prefilling = Prefilling(engine, self._slots, self._throttle)
        self._batch = Batch(engine, self._slots, prefilling, self._decoding, self._energy)
        self._sleep_after_s = sleep_after_s
        self._max_queue = max_queue
        self._changed = threading.Condition()
        self._waiting: deque[Sequence] = deque()  # guarded by _changed
        self._accepting = False  # guarded by _changed
        self._unload = False  # guarded by _changed: the weights are to leave the memory with the next idleness
        self._stopping = False  # guarded by _changed
        self._asleep = False  # the engine's thread only, like all below
        self._progress_at = time.monotonic()
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
            active = self._batch.active
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
                num_preempted=self._batch.num_preempted,
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
                for sequence in self._batch.active
                if sequence.slot >= 0
            ]

    def queue(self) -> list[Place]:
        """Where the waiting sequences are, in their order."""
        with self._changed:
            return [self._place(sequence, position) for position, sequence in enumerate(self._waiting)]

    def find(self, request_id: str) -> Place | None:
        """Where a request is, of several sequences the one that is furthest; None where it is not known any more."""
        with self._changed:
            places = [(None, sequence) for sequence in self._batch.active] + list(enumerate(self._waiting))
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

    def _idle(self) -> bool:
        return not (self._waiting or self._batch.active)

    def _eta_s(self, position: int) -> float:
        """Seconds until a sequence at ``position`` may start, from the mean duration of recent requests."""
        return (position + 1) * self._batch.mean_s / self._engine.slots

    def _run(self) -> None:
        while self._await_work():
            try:
                if self._asleep:
                    self._wake()
                self._step()
            except Exception as error:  # whatever goes wrong, the service lives on
                if not isinstance(error, QwedgeError):
                    log.exception("the engine failed")
                    error = engine_failure()
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
        for sequence in self._batch.make_room():
            with self._changed:
                self._waiting.appendleft(sequence)
        self._batch.step()
        self._progress_at = time.monotonic()
        self._throttle.rest(self._progress_at - began)

    def _reap(self, now: float) -> None:
        """End cancelled and late sequences, wherever they are."""
        with self._changed:
            ended = [sequence for sequence in self._waiting if _verdict(sequence, now)]
            for sequence in ended:
                self._waiting.remove(sequence)
        for sequence in [*ended, *self._batch.active]:
            if error := _verdict(sequence, now):
                self._batch.fail(sequence, error)
        if ended:
            self._announce_positions()

    def _admit(self) -> None:
        """Move the oldest waiting sequence into prefill when there is a slot, and room in the budget."""
        if self._batch.prefilling is not None or not self._slots.any_free:
            return
        with self._changed:
            if not self._waiting or not self._slots.has_room(self._batch.active, self._waiting[0]):
                return
            sequence = self._waiting.popleft()
            self._batch.prefilling = sequence
        self._batch.begin(sequence)
        self._announce_positions()

    def _announce_positions(self) -> None:
        with self._changed:
            for position, sequence in enumerate(self._waiting):
                if sequence.started_at is None:
                    sequence.consumer.queued(position, self._eta_s(position))

    def _fail_all(self, error: QwedgeError) -> None:
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for sequence in [*self._batch.active, *waiting]:
            self._batch.fail(sequence, error)


def _phase(sequence: Sequence) -> Literal["prefill", "decode"]:
    return "prefill" if sequence.status is SequenceStatus.PREFILL else "decode"


def _verdict(sequence: Sequence, now: float) -> QwedgeError | None:
    if sequence.cancelled:
        return CancelledError("the request was cancelled")
    if sequence.deadline is not None and now >= sequence.deadline:
        return DeadlineError("the deadline passed", hint="allow more time, ask for fewer tokens, or send it later")
    return None
