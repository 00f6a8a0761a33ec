"""Which requests run, and through the journal which were answered: what makes a repeated request safe.

A client that hears nothing sends its request again under the same id. The ledger lets the copy share the running job,
or gives the journal's answer back, also after a restart; the same id with another payload is a conflict.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from edge.errors import ConflictError, UnavailableError
from edge.journal import Journal, Key, Known
from edge.mqtt.messages import Done
from edge.mqtt.topics import ReplyTopics, RequestId
from edge.openai import Answer
from edge.openai.embeddings import EmbeddingAnswer
from edge.service import Event, Ticket

OWNER = "mqtt:"
"""What the journal's owners of MQTT requests begin with; the client follows."""


@dataclass(frozen=True)
class Reply:
    """Where and how to answer."""

    id: str
    topics: ReplyTopics
    plain: bool
    """The request was bare text: publish the bare answer too."""
    correlation: bytes | None = None
    """MQTT 5 Correlation Data to echo."""


@dataclass
class Batch:
    """Text of one choice that is not published yet."""

    text: str = ""
    reasoning: str = ""


@dataclass(eq=False)
class Job:
    """A request without an outcome."""

    request: RequestId
    fingerprint: bytes
    reply: Reply
    """Where its newest copy wants the answer."""
    stream: bool
    answer: Answer | EmbeddingAnswer | None = None
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
    held: list[tuple[int, Event]] | None = field(default_factory=list)
    """What happened before the request was durable, and is not told before; None from then on. The answers thread
    only."""
    ended: bool = False
    """Its outcome is known; the answers thread only."""
    cancelled: bool = False
    """The client asked for the end."""

    @property
    def key(self) -> Key:
        """Its name in the journal, where other front ends have theirs."""
        return Key(OWNER + self.request.client, self.request.id)


class Ledger:
    """The jobs by request; safe to use from any thread.

    Args:
        journal: holds the outcomes.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._changed = threading.Condition()
        self._running: dict[RequestId, Job] = {}

    def open(self, job: Job) -> Job | Done | None:
        """Enter a request.

        Returns:
            None where it is new and must be run; the job it now shares; or its outcome, if it has ended.

        Raises:
            ConflictError: the id stands for another payload.
            UnavailableError: it is stored and will be run again, or it cannot be told whether it has ended.
        """
        with self._changed:
            if running := self._running.get(job.request):
                _check_same(running.fingerprint, job.fingerprint)
                running.reply = job.reply
                return running
            if known := self._journal.find(job.key):
                _check_same(known.fingerprint, job.fingerprint)
                return _outcome(known)
            self._running[job.request] = job
            return None

    def adopt(self, job: Job) -> bool:
        """Enter a request that the journal held over a restart; returns whether it does not run yet."""
        with self._changed:
            return self._running.setdefault(job.request, job) is job

    def close(self, job: Job) -> Reply:
        """A job has ended, and its outcome is in the journal if copies that come later are to get it.

        Returns:
            Where its newest copy wants the outcome.
        """
        with self._changed:
            self._running.pop(job.request, None)
            self._changed.notify_all()
            return job.reply

    def find(self, request: RequestId) -> Job | None:
        """The running job of a request."""
        with self._changed:
            return self._running.get(request)

    def runs(self, job: Job) -> bool:
        """Whether a job has no outcome yet."""
        with self._changed:
            return self._running.get(job.request) is job

    def running(self) -> list[Job]:
        """All running jobs."""
        with self._changed:
            return list(self._running.values())

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no job runs; returns whether that is so."""
        return self.wait(lambda: not self._running, timeout_s)

    def wait(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until something is so, looking again whenever a job ends or :meth:`wake` is called."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def wake(self) -> None:
        """Let those who wait look again."""
        with self._changed:
            self._changed.notify_all()


def _outcome(known: Known) -> Done:
    if known.outcome is None:
        raise UnavailableError("the request waits to be run again", hint="the answer will come", retry_after_s=1)
    return Done.model_validate_json(known.outcome)


def _check_same(known: bytes, fingerprint: bytes) -> None:
    if known != fingerprint:
        hint = "a new request needs a new id"
        raise ConflictError("this request id was used for another request", hint=hint, param="id")
