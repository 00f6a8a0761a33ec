"""From the service's events to published messages.

One thread takes the events of all jobs in their order, so that a job's state needs no lock. The first token is
published at once; those that follow within :data:`BATCH_S` go out together. Nothing of a job is published before its
request is in the journal, and its outcome not before that is.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from edge.errors import CancelledError, EngineError, QwedgeError, TooLargeError, UnavailableError
from edge.journal import Journal, Key
from edge.mqtt.connection import Connection
from edge.mqtt.ledger import Job, Ledger, Reply
from edge.mqtt.messages import MAX_OUTCOME_BYTES, Accepted, Done, Queued, Started, Tokens
from edge.mqtt.packets import Outgoing
from edge.mqtt.stored import pack_reply
from edge.service import Delta, Event, Failed, Finished, Pooled, PromptScored
from edge.service import Queued as QueuedEvent
from edge.service import Started as StartedEvent

log = logging.getLogger(__name__)

BATCH_S: Final = 0.05
"""Shortest time between two token batches of one answer."""
POSITION_INTERVAL_S: Final = 1.0
"""Shortest time between two positions of one waiting request."""


MAX_UNCONFIRMED: Final = 1000
"""Outcomes that the broker has not confirmed and that are watched; after a restart the others are sent once more."""


@dataclass(frozen=True)
class Stored:
    """A job's request is in the journal, or could not be entered and the job has ended."""

    ok: bool


class Answers:
    """Publishes what happens to jobs.

    Args:
        connection: where to.
        ledger: learns which jobs end.
        journal: learns how.
        device: our name, for ``accepted``.
    """

    def __init__(self, connection: Connection, ledger: Ledger, journal: Journal, device: str) -> None:
        self._connection = connection
        self._ledger = ledger
        self._journal = journal
        self._device = device
        # Bounded by the requests themselves: one event for each token and for each movement in the queue.
        self._events: queue.SimpleQueue[tuple[Job, int, Event | Stored] | None] = queue.SimpleQueue()
        self._unconfirmed: deque[tuple[Key, Callable[[], bool]]] = deque(maxlen=MAX_UNCONFIRMED)
        self._confirming = threading.Lock()  # who holds it takes from the queue's front
        self._unflushed: set[Job] = set()
        self._thread: threading.Thread | None = None
        self.stopping = False
        """Whether jobs end because we do: they are answered with 503 instead of 499."""
        self.tokens_per_s = 0.0
        """Decode speed of the latest answer."""
        self.num_outcomes = 0
        """Outcomes published."""

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="mqtt-answers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Publish what is left and end the thread."""
        self._events.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def put(self, job: Job, index: int, event: Event) -> None:
        """Take an event of one of a job's choices; called on the engine's thread."""
        self._events.put((job, index, event))

    def stored(self, job: Job, *, ok: bool) -> None:
        """Tell what happened to a job up to now and from now on, or nothing of it; from any thread."""
        self._events.put((job, 0, Stored(ok)))

    def attached(self, job: Job) -> None:
        """Tell the client that its copy shares a running job."""
        evt = Accepted(id=job.request.id, device=self._device, duplicate=True)
        self._progress(job.reply, evt)

    def outcome(self, reply: Reply, done: Done, key: Key | None = None) -> None:
        """Publish the one outcome of a request; from any thread.

        Args:
            reply: where to.
            done: the outcome.
            key: of the request, where the journal keeps its outcome and should know that it arrived.
        """
        messages = [Outgoing(reply.topics.done, done.encode(), qos=1, correlation=reply.correlation)]
        if reply.plain:
            topic = reply.topics.text if done.status == 200 else reply.topics.error
            plain = plain_text(done).encode("utf-8", errors="replace")
            messages.append(Outgoing(topic, plain, qos=1, content_type="text/plain", correlation=reply.correlation))
        confirmed = None
        for message in messages:
            confirmed = self._connection.track(message)
            if confirmed is None:
                log.error("too many answers wait for the broker; dropped the one to %s", message.topic)
        if key is not None and confirmed is not None:
            self._unconfirmed.append((key, confirmed))
        self.num_outcomes += 1

    def refuse(self, reply: Reply, error: QwedgeError) -> None:
        """Publish that a request failed and is forgotten; from any thread."""
        self.outcome(reply, Done.failure(reply.id, error))

    def confirm(self) -> None:
        """Tell the journal which outcomes the broker has; from any thread."""
        with self._confirming:
            for _ in range(len(self._unconfirmed)):
                key, confirmed = self._unconfirmed.popleft()
                if confirmed():
                    self._journal.delivered(key)
                else:
                    self._unconfirmed.append((key, confirmed))

    def end(self, job: Job, error: QwedgeError) -> None:
        """A job has failed; its own thread, or any before it was submitted."""
        # A failure that may pass is forgotten: the client's next attempt runs.
        self._settle(job, Done.failure(job.request.id, error), keep=not error.retryable)

    # --- the answers thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                item = self._events.get(timeout=self._until_flush())
            except queue.Empty:
                self._flush_due()
                continue
            if item is None:
                return
            self._guarded(*item)
            self._flush_due()

    def _until_flush(self) -> float | None:
        """Seconds until the next batch is due; None where nothing waits."""
        if not self._unflushed:
            return None
        return max(0.0, min(job.flushed_at for job in self._unflushed) + BATCH_S - time.monotonic())

    def _flush_due(self) -> None:
        now = time.monotonic()
        for job in [job for job in self._unflushed if now - job.flushed_at >= BATCH_S]:
            self._flush(job)

    def _guarded(self, job: Job, index: int, event: Event | Stored) -> None:
        try:
            if isinstance(event, Stored):
                self._release(job, ok=event.ok)
            elif job.held is not None:
                job.held.append((index, event))
            elif not job.ended:
                self._take(job, index, event)
        except Exception:  # one broken answer must not end those of all others
            log.exception("an event could not be published")
            self._abort(job)

    def _release(self, job: Job, *, ok: bool) -> None:
        """Go through what was held back."""
        held, job.held = job.held or [], None
        job.ended = not ok
        for index, event in held:
            if not job.ended:
                self._take(job, index, event)

    def _abort(self, job: Job) -> None:
        """End a job that we failed to answer."""
        self._unflushed.discard(job)
        if job.ticket is not None:
            job.ticket.cancel()
        if not job.ended:
            self.end(job, EngineError("the answer could not be published", hint="see the device's log"))

    def _take(self, job: Job, index: int, event: Event) -> None:
        match event:
            case QueuedEvent():
                self._queued(job, event)
            case StartedEvent():
                self._progress(job.reply, Started(id=job.request.id))
            case PromptScored() | Pooled() | Delta():
                self._collect(job, index, event)
            case Finished():
                self._finished(job, index, event)
            case Failed():
                self._flush(job)
                self.end(job, self._reason(job, event.error))

    def _queued(self, job: Job, event: QueuedEvent) -> None:
        now = time.monotonic()
        if job.queued_at is None:
            self._progress(job.reply, Accepted(id=job.request.id, device=self._device))
        elif now - job.queued_at < POSITION_INTERVAL_S:
            return  # every start moves all that wait: a long queue would fill the link with positions
        job.queued_at = now
        evt = Queued(id=job.request.id, position=event.position, eta_ms=round(event.eta_s * 1000))
        self._progress(job.reply, evt)

    def _collect(self, job: Job, index: int, event: PromptScored | Pooled | Delta | Finished) -> None:
        """Add an event to the answer, and its text to the next batch."""
        assert job.answer is not None
        chunks = job.answer.chunks(index, event)
        if not job.stream:
            return
        for delta in _deltas(chunks):
            text, reasoning = delta.get("content") or delta.get("text") or "", delta.get("reasoning_content") or ""
            if text or reasoning:
                job.batches[index].text += text
                job.batches[index].reasoning += reasoning
                self._unflushed.add(job)

    def _flush(self, job: Job) -> None:
        """Publish the waiting text, as one batch for each choice."""
        if job not in self._unflushed:
            return
        self._unflushed.discard(job)
        job.flushed_at = time.monotonic()
        for index, batch in job.batches.items():
            tokens = Tokens(
                id=job.request.id, seq=job.seq, index=index, text=batch.text, reasoning=batch.reasoning or None
            )
            job.seq += 1
            reply = job.reply
            self._connection.publish(Outgoing(reply.topics.tok, tokens.encode(), qos=0, correlation=reply.correlation))
        job.batches.clear()

    def _finished(self, job: Job, index: int, event: Finished) -> None:
        """A choice is complete, and with the last one the answer."""
        self._collect(job, index, event)
        if event.timings.tpot_s:
            self.tokens_per_s = round(1 / event.timings.tpot_s, 1)
        assert job.answer is not None
        if job.answer.ended:
            self._flush(job)
            self._answered(job, job.answer.body())

    def _answered(self, job: Job, body: dict[str, Any]) -> None:
        done = Done.success(job.request.id, body)
        if len(done.encode()) > MAX_OUTCOME_BYTES:
            hint = "ask for fewer log-probabilities, choices or tokens"
            self.end(job, TooLargeError(f"the answer is larger than {MAX_OUTCOME_BYTES} bytes", hint=hint))
            return
        self._settle(job, done, keep=True)

    def _settle(self, job: Job, done: Done, *, keep: bool) -> None:
        """Enter the outcome, then publish it."""
        job.ended = True
        self.confirm()
        outcome = done.encode() if keep else None
        self._journal.settle(job.key, pack_reply(job.reply), outcome, partial(self._settled, job, done, keep))

    def _settled(self, job: Job, done: Done, keep: bool, _error: QwedgeError | None) -> None:
        self.outcome(self._ledger.close(job), done, job.key if keep else None)

    def _reason(self, job: Job, error: QwedgeError) -> QwedgeError:
        """Why a job failed, as its client should see it."""
        if self.stopping and isinstance(error, CancelledError) and not job.cancelled:
            return UnavailableError("the device is stopping", hint="send the request again", retry_after_s=5)
        return error

    def _progress(self, reply: Reply, event: Accepted | Queued | Started) -> None:
        # Progress is worth nothing once the link is back: it must not push outcomes out of the waiting queue.
        if self._connection.ready:
            message = Outgoing(reply.topics.evt, event.encode(), qos=1, correlation=reply.correlation)
            self._connection.publish(message)


def _deltas(chunks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The new text of chat chunks and of text chunks."""
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            yield choice.get("delta", choice)


def plain_text(done: Done) -> str:
    """The bare answer of an outcome, or one line about the failure."""
    if done.status != 200:
        error = done.body["error"]
        hint = f" (hint: {error['hint']})" if error["hint"] else ""
        return f"{done.status} {error['message']}{hint}"
    choice = done.body["choices"][0]
    return str(choice["message"]["content"] or "") if "message" in choice else str(choice["text"])
