"""Which sequence the engine works on next: admission, chunked prefill, batched decode, deadlines and cancellation.

One thread owns the engine. Each turn of its loop decodes one token for every running sequence, then prefills one chunk
of one waiting sequence, so that a long prompt delays running streams by one chunk at most. Running sequences occupy the
rows 0..n-1 of the engine's KV pool and the sequence in prefill occupies row n: a decode step is always one contiguous
batch. When a sequence leaves, the last row moves into its place.

The scheduler sees token ids only. What a token means (text, stop strings) is the consumer's business, see
``edge.sequence.Consumer``; the service is the one that implements it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge.engine.interface import Engine
from edge.engine.prefix_cache import Prefix, PrefixCache
from edge.engine.speculation import MAX_DRAFT, DraftLength, PromptLookup
from edge.errors import CancelledError, DeadlineError, EngineError, OverloadedError, QwedgeError, UnavailableError
from edge.sequence import FinishReason, Sequence, SequenceStatus

log = logging.getLogger(__name__)

_EWMA = 0.2
"""Weight of the newest request in the running mean that retry hints and ETAs are made from."""


@dataclass(frozen=True)
class SchedulerStats:
    """A snapshot for health, metrics and the MQTT load topic."""

    num_waiting: int
    num_running: int
    """In prefill or decode."""
    slots: int
    max_queue: int
    accepting: bool
    seconds_since_progress: float
    """0 when idle; else since the engine last finished a step. Health follows this."""


class Scheduler:
    """Runs sequences on an engine, in order of arrival.

    Args:
        engine: the engine; after :meth:`start` only the scheduler's thread touches it.
        max_queue: sequences that may wait; one more is refused with :class:`OverloadedError`.
        prefix_cache_bytes: memory for keys and values of past prompts; 0 = none.
        draft_tokens: most tokens guessed ahead for a sequence that runs alone (``edge.engine.speculation``).
    """

    def __init__(self, engine: Engine, *, max_queue: int, prefix_cache_bytes: int = 0, draft_tokens: int = 0) -> None:
        self._engine = engine
        self._draft_length = DraftLength(min(draft_tokens, MAX_DRAFT))
        self._prefixes = PrefixCache(prefix_cache_bytes)  # the engine's thread only
        self._max_queue = max_queue
        self._changed = threading.Condition()
        self._waiting: deque[Sequence] = deque()  # guarded by _changed
        self._accepting = False  # guarded by _changed
        self._stopping = False  # guarded by _changed
        self._running: list[Sequence] = []  # _running[i].row == i; the engine's thread only
        self._prefilling: Sequence | None = None  # the engine's thread only
        self._progress_at = time.monotonic()
        self._mean_request_s = 1.0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the engine's thread and accept sequences."""
        with self._changed:
            self._accepting = True
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
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            OverloadedError: the queue is full.
            UnavailableError: the scheduler is stopping.
        """
        with self._changed:
            if not self._accepting:
                raise UnavailableError("the server is shutting down", hint="try again when it is back", retry_after_s=5)
            position = len(self._waiting)
            if position >= self._max_queue:
                retry = max(1.0, self._eta_s(position) / 2)
                raise OverloadedError(f"{position} requests are waiting", hint="try again later", retry_after_s=retry)
            if self._idle():
                # The engine's thread has not woken up yet: idleness must not count as a lack of progress.
                self._progress_at = time.monotonic()
            self._waiting.append(sequence)
            sequence.consumer.queued(position, self._eta_s(position))
            self._changed.notify_all()

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence at the next step; harmless when it has ended already."""
        with self._changed:
            sequence.cancelled = True
            self._changed.notify_all()

    def stats(self) -> SchedulerStats:
        """The state right now; cheap enough for every health check."""
        with self._changed:
            running = len(self._running) + (self._prefilling is not None)
            busy = bool(running or self._waiting)
            return SchedulerStats(
                num_waiting=len(self._waiting),
                num_running=running,
                slots=self._engine.slots,
                max_queue=self._max_queue,
                accepting=self._accepting,
                seconds_since_progress=time.monotonic() - self._progress_at if busy else 0.0,
            )

    def _idle(self) -> bool:
        return not (self._waiting or self._running or self._prefilling)

    def _eta_s(self, position: int) -> float:
        """Seconds until a sequence at ``position`` may start, from the mean duration of recent requests."""
        return (position + 1) * self._mean_request_s / self._engine.slots

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.notify_all()  # stop() waits for idleness
                if self._idle():
                    self._changed.wait_for(lambda: self._stopping or not self._idle())
                    self._progress_at = time.monotonic()
                if self._stopping:
                    break
            self._step()
        self._fail_all(UnavailableError("the server shut down", hint="send the request again", retry_after_s=5))

    def _step(self) -> None:
        """One turn: drop what must end, decode all running sequences, prefill one chunk."""
        self._reap()
        self._admit()
        if self._running:
            self._guarded(self._decode, self._running)
        if self._prefilling is not None:
            self._guarded(self._prefill, [self._prefilling])
        self._progress_at = time.monotonic()

    def _reap(self) -> None:
        """End cancelled and late sequences, wherever they are."""
        now = time.monotonic()
        with self._changed:
            ended = [sequence for sequence in self._waiting if _verdict(sequence, now)]
            for sequence in ended:
                self._waiting.remove(sequence)
        active = [*self._running, *([self._prefilling] if self._prefilling else [])]
        for sequence in [*ended, *active]:
            if error := _verdict(sequence, now):
                self._fail(sequence, error)
        if ended:
            self._announce_positions()

    def _admit(self) -> None:
        """Move the oldest waiting sequence into prefill when a row is free."""
        if self._prefilling is not None or len(self._running) >= self._engine.slots:
            return
        with self._changed:
            if not self._waiting:
                return
            sequence = self._waiting.popleft()
            self._prefilling = sequence
        sequence.status = SequenceStatus.PREFILL
        sequence.row = len(self._running)
        sequence.started_at = time.monotonic()
        self._reuse_prefix(sequence)
        sequence.consumer.started()
        self._announce_positions()

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Start with the keys and values of a known beginning."""
        if found := self._prefixes.find(sequence.identity, sequence.prompt_ids):
            prefix, length = found
            self._engine.write_row(sequence.row, prefix.cache, length)
            sequence.num_computed_tokens = sequence.num_cached_tokens = length

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Remember a sequence's keys and values before its row is given away."""
        length = sequence.num_computed_tokens
        ids = sequence.computed_ids()
        wanted = self._prefixes.wants(length, length * self._engine.bytes_per_token)
        if wanted and not self._prefixes.has(sequence.identity, ids):
            self._prefixes.put(Prefix(sequence.identity, ids, self._engine.read_row(sequence.row, length)))

    def _announce_positions(self) -> None:
        with self._changed:
            for position, sequence in enumerate(self._waiting):
                sequence.consumer.queued(position, self._eta_s(position))

    def _prefill(self) -> None:
        """Prefill one chunk; after the last one the first token is there."""
        sequence = self._prefilling
        assert sequence is not None
        assert sequence.row == len(self._running)
        past = sequence.num_computed_tokens
        chunk = sequence.prompt_ids[past : past + self._chunk_length(len(sequence.prompt_ids) - past)]
        logits = self._engine.prefill(sequence.row, chunk, past)
        sequence.num_computed_tokens = past + len(chunk)
        if sequence.num_computed_tokens == len(sequence.prompt_ids):
            self._prefilling = None
            self._running.append(sequence)
            sequence.status = SequenceStatus.DECODE
            self._next_token(sequence, logits)

    def _chunk_length(self, remaining: int) -> int:
        """Tokens of the next chunk; never one that leaves a single token for the last.

        The kernels give the same bits for a token in every chunk of two or more, but others for a token by itself
        (docs/lab-notes.md). So how a prompt is cut, and how much of it an earlier prompt had, changes no bit.
        """
        length = min(remaining, self._engine.prefill_chunk)
        return length - 1 if remaining - length == 1 else length

    def _decode(self) -> None:
        """At least one token for every running sequence."""
        if len(self._running) == 1 and self._prefilling is None:
            self._decode_alone(self._running[0])
        else:
            self._decode_batch()

    def _decode_alone(self, sequence: Sequence) -> None:
        """One step for the only sequence, verifying a guess of several tokens where that has paid so far."""
        guess = self._guess(sequence)
        ids, past = [sequence.output_ids[-1], *guess], sequence.num_computed_tokens
        sequence.sampler.prepare()
        started_at = time.monotonic()
        logits = self._engine.verify(0, np.array(ids), past) if guess else self._engine.decode(ids, [past])
        self._draft_length.took(len(ids), time.monotonic() - started_at)
        num_right = 0
        for position in range(len(ids)):
            sequence.num_computed_tokens += 1
            self._next_token(sequence, logits[position])
            ended = sequence.status is SequenceStatus.FINISHED
            if ended or guess[position : position + 1] != sequence.output_ids[-1:]:
                break
            num_right += 1
        self._draft_length.guessed(len(guess), num_right)

    def _guess(self, sequence: Sequence) -> list[int]:
        """What may come next, as far as there is room for it; nothing where guessing does not pay."""
        room = self._engine.context_length - sequence.num_computed_tokens - 1
        most = min(self._draft_length.best(), room, sequence.max_tokens - sequence.num_output_tokens - 1)
        if most <= 0:
            return []
        if forced := sequence.sampler.forced_tokens():
            return forced[:most]
        if sequence.lookup is None:
            sequence.lookup = PromptLookup(sequence.prompt_ids.tolist())
        known_outputs = len(sequence.lookup) - len(sequence.prompt_ids)
        sequence.lookup.extend(sequence.output_ids[known_outputs:])
        return sequence.lookup.guess(most)

    def _decode_batch(self) -> None:
        """One token for every running sequence."""
        batch = list(self._running)
        for sequence in batch:
            sequence.sampler.prepare()
        logits = self._engine.decode(
            [sequence.output_ids[-1] for sequence in batch], [sequence.num_computed_tokens for sequence in batch]
        )
        for sequence in batch:
            sequence.num_computed_tokens += 1
        for i, sequence in enumerate(batch):
            self._guarded(partial(self._next_token, sequence, logits[i]), [sequence])

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
        elif sequence.num_output_tokens >= sequence.max_tokens or self._context_is_full(sequence):
            self._finish(sequence, "length")

    def _context_is_full(self, sequence: Sequence) -> bool:
        return len(sequence.prompt_ids) + sequence.num_output_tokens >= self._engine.context_length

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._keep_prefix(sequence)
        self._release(sequence)
        timings = sequence.timings()
        total = timings.prefill_s + timings.decode_s
        self._mean_request_s += _EWMA * (total - self._mean_request_s)
        sequence.consumer.finished(reason, timings)

    def _fail(self, sequence: Sequence, error: QwedgeError) -> None:
        if isinstance(error, CancelledError | DeadlineError):
            self._keep_prefix(sequence)  # the work was sound, only nobody waited for the end
        self._release(sequence)
        sequence.consumer.failed(error, sequence.timings())

    def _fail_all(self, error: QwedgeError) -> None:
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for sequence in [*self._running, *([self._prefilling] if self._prefilling else []), *waiting]:
            self._fail(sequence, error)

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence off its row and close the gap, so that decode stays one contiguous batch."""
        if sequence.status is SequenceStatus.PREFILL:
            self._prefilling = None
            self._engine.release_row(sequence.row)
        elif sequence.status is SequenceStatus.DECODE:
            self._engine.release_row(sequence.row)
            last = self._running.pop()
            if last is not sequence:
                self._move(last, sequence.row)
                self._running[last.row] = last
            if self._prefilling is not None:
                self._move(self._prefilling, len(self._running))
        sequence.status = SequenceStatus.FINISHED

    def _move(self, sequence: Sequence, row: int) -> None:
        self._engine.move_row(sequence.row, row, sequence.num_computed_tokens)
        sequence.row = row

    def _guarded(self, work: Callable[[], None], sequences: list[Sequence]) -> None:
        """Run engine work; a failure ends the sequences it was for, and only those."""
        try:
            work()
        except QwedgeError as error:
            failure: QwedgeError = error
        except Exception:  # whatever the engine throws, the service lives on
            log.exception("the engine failed")
            failure = EngineError("the engine failed on this request", hint="see the server's log; try again")
        else:
            return
        for sequence in list(sequences):
            self._fail(sequence, failure)


def _verdict(sequence: Sequence, now: float) -> QwedgeError | None:
    if sequence.cancelled:
        return CancelledError("the request was cancelled")
    if sequence.deadline is not None and now >= sequence.deadline:
        return DeadlineError("the deadline passed", hint="allow more time, ask for fewer tokens, or send it later")
    return None
