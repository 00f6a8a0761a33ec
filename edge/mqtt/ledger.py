"""Which requests run and which were answered: what makes a repeated request safe.

A client that hears nothing sends its request again under the same id. The ledger lets the copy share the running job,
or gives the remembered answer back; the same id with another payload is a conflict. It lives in memory and is bounded:
an answer that was pushed out, or a restart, means that a repeated request runs again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Final

from edge.errors import ConflictError
from edge.mqtt.messages import Done
from edge.mqtt.topics import ReplyTopics, RequestId
from edge.openai import Answer
from edge.service import Ticket

MAX_REMEMBERED: Final = 1024
MAX_REMEMBERED_BYTES: Final = 8 << 20


@dataclass(frozen=True)
class Reply:
    """Where and how to answer."""

    id: str
    topics: ReplyTopics
    plain: bool
    """The request was bare text: publish the bare answer too."""
    correlation: bytes | None = None
    """MQTT 5 Correlation Data to echo."""


@dataclass(frozen=True)
class Outcome:
    """How a request ended."""

    done: Done
    text: str
    """The bare answer, or one line about the failure."""

    @property
    def size(self) -> int:
        """Approximate bytes in memory."""
        return len(self.done.encode()) + len(self.text)


@dataclass
class Batch:
    """Text of one choice that is not published yet."""

    text: str = ""
    reasoning: str = ""


@dataclass(eq=False)
class Job:
    """A request that runs."""

    request: RequestId
    fingerprint: bytes
    reply: Reply
    """Where its newest copy wants the answer."""
    stream: bool
    answer: Answer | None = None
    """Collects what the model writes; set before the job is submitted."""
    ticket: Ticket | None = None
    seq: int = 0
    """Of the next token batch; the answers thread only."""
    batches: defaultdict[int, Batch] = field(default_factory=lambda: defaultdict(Batch))
    """By the choice's index, what is not published yet; the answers thread only."""
    flushed_at: float = 0.0
    """When the last batch was published; the answers thread only."""
    queued_at: float | None = None
    """When its position was published last; None before ``accepted``. The answers thread only."""
    ended: bool = False
    """Its outcome was published; the answers thread only."""
    cancelled: bool = False
    """The client asked for the end."""


class Ledger:
    """The jobs by request; safe to use from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[RequestId, Job] = {}
        self._outcomes: OrderedDict[RequestId, tuple[bytes, Outcome]] = OrderedDict()
        self._bytes = 0

    def open(self, job: Job) -> Job | Outcome | None:
        """Enter a request.

        Returns:
            None where it is new and must be run; the job it now shares; or its outcome, if it has ended.

        Raises:
            ConflictError: the id stands for another payload.
        """
        with self._changed:
            if running := self._running.get(job.request):
                _check_same(running.fingerprint, job.fingerprint)
                running.reply = job.reply
                return running
            if known := self._outcomes.get(job.request):
                _check_same(known[0], job.fingerprint)
                self._outcomes.move_to_end(job.request)
                return known[1]
            self._running[job.request] = job
            return None

    def close(self, job: Job, outcome: Outcome | None) -> Reply:
        """A job has ended; with an outcome, that is remembered.

        Returns:
            Where to publish: copies that come later get the remembered outcome.
        """
        with self._changed:
            del self._running[job.request]
            if outcome is not None:
                self._remember(job, outcome)
            self._changed.notify_all()
            return job.reply

    def find(self, request: RequestId) -> Job | None:
        """The running job of a request."""
        with self._changed:
            return self._running.get(request)

    def running(self) -> list[Job]:
        """All running jobs."""
        with self._changed:
            return list(self._running.values())

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no job runs; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    def _remember(self, job: Job, outcome: Outcome) -> None:
        self._outcomes[job.request] = (job.fingerprint, outcome)
        self._bytes += outcome.size
        while len(self._outcomes) > MAX_REMEMBERED or self._bytes > MAX_REMEMBERED_BYTES:
            _, (_, oldest) = self._outcomes.popitem(last=False)
            self._bytes -= oldest.size


def _check_same(known: bytes, fingerprint: bytes) -> None:
    if known != fingerprint:
        hint = "a new request needs a new id"
        raise ConflictError("this request id was used for another request", hint=hint, param="id")
