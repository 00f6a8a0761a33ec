"""From incoming messages to submitted jobs.

One thread takes the messages in their order, so that a cancel never overtakes its request. It does what takes time:
reading JSON, rendering the template, tokenizing. Whatever a message holds, it gets one outcome or is ignored.

A new request goes to the engine and to the journal at the same time. When it is in the journal the broker is told that
it arrived, and its progress may be published; where the journal cannot take it, it is cancelled and refused.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from edge.errors import (
    DeadlineError,
    EngineError,
    OverloadedError,
    QwedgeError,
    RequestError,
    UnavailableError,
)
from edge.journal import Journal
from edge.mqtt.answers import Answers
from edge.mqtt.inbox import Inbox
from edge.mqtt.ledger import Job, Ledger, Reply
from edge.mqtt.messages import Done
from edge.mqtt.packets import Incoming
from edge.mqtt.payload import Wanted, is_plain, read
from edge.mqtt.resume import MAX_STARTS, Resumer
from edge.mqtt.stored import pack, pack_reply
from edge.mqtt.topics import CancelTopic, Layout, RequestId, RequestTopic
from edge.service import Service

log = logging.getLogger(__name__)

FULL_RETRY_S = 1.0
"""When to try again after the inbox was full."""


class Intake:
    """Takes messages off the network thread and turns them into jobs.

    Args:
        service: runs the jobs.
        layout: our topics.
        journal: makes requests durable; it is opened and closed by others.
        ledger: knows the jobs.
        answers: publishes what becomes of them.
        max_starts: runs of one request that may end with the process.
    """

    def __init__(
        self,
        service: Service,
        layout: Layout,
        journal: Journal,
        ledger: Ledger,
        answers: Answers,
        *,
        max_starts: int = MAX_STARTS,
    ) -> None:
        self._service = service
        self._layout = layout
        self._journal = journal
        self._ledger = ledger
        self._answers = answers
        self._resumer = Resumer(
            layout,
            journal,
            ledger,
            answers,
            run=self._run_again,
            has_room=self._has_room,
            max_starts=max_starts,
        )
        self._inbox = Inbox()
        self._thread: threading.Thread | None = None
        self.num_requests = 0
        """Requests taken, copies and refused ones included."""

    def start(self) -> None:
        """Take up what was not answered before the restart, and start the thread."""
        self._resumer.start()
        self._thread = threading.Thread(target=self._take_all, name="mqtt-intake", daemon=True)
        self._thread.start()

    def leave_stored(self) -> None:
        """Begin no stored request any more: the next start will."""
        self._resumer.stop()

    def stop(self) -> None:
        """Look at what has arrived and end the thread."""
        self._inbox.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def put(self, message: Incoming) -> None:
        """Take a message, of whatever connection; its ``ack`` is called when it is safe. On the network thread."""
        if not self._inbox.put(message):
            self.refuse(message)

    def refuse(self, message: Incoming, retry_after_s: float = FULL_RETRY_S) -> None:
        """Answer a request with 429; called on a network thread."""

        def full(*_request: object) -> None:
            raise OverloadedError("too many requests at once", hint="try again later", retry_after_s=retry_after_s)

        self._dispatch(message, full)

    def _take_all(self) -> None:
        while (message := self._inbox.get()) is not None:
            self._dispatch(message, self._submit)

    def _dispatch(self, message: Incoming, on_request: Callable[[RequestId, Reply, Incoming], None]) -> None:
        """Tell requests from cancels; a request that fails gets its outcome here, whatever the failure."""
        try:
            topic = self._layout.parse(message.topic)
        except RequestError as error:
            log.warning("ignored a message on %.200r: %s", message.topic, error.message)
            message.ack()
            return
        if message.retain:
            log.warning("ignored a retained message on %s", message.topic)
        elif isinstance(topic, CancelTopic):
            self._cancel(topic.request)
        else:
            self._request(topic, message, on_request)
            return
        message.ack()

    def _request(
        self, topic: RequestTopic, message: Incoming, on_request: Callable[[RequestId, Reply, Incoming], None]
    ) -> None:
        self.num_requests += 1
        request = topic.request
        plain = message.payload is not None and is_plain(message.payload)
        reply = Reply(request.id, self._layout.reply(request), plain, message.correlation)
        try:
            reply = replace(reply, topics=self._layout.reply(request, message.response_topic))
            self._check_open()
            on_request(request, reply, message)
        except QwedgeError as error:
            self._refuse(reply, message, error)
        except Exception:  # whatever a payload does to us, the next one is served
            log.exception("a request could not be taken")
            hint = "see the device's log"
            self._refuse(reply, message, EngineError("the request could not be taken", hint=hint))

    def _refuse(self, reply: Reply, message: Incoming, error: QwedgeError) -> None:
        self._answers.refuse(reply, error)
        message.ack()

    def _check_open(self) -> None:
        if self._answers.stopping:
            raise UnavailableError("the device is stopping", hint="try again when it is back", retry_after_s=5)

    def _submit(self, request: RequestId, reply: Reply, message: Incoming) -> None:
        """Run a request, share the job of its copy, or give the remembered outcome back."""
        wanted = self._read(message)
        job = Job(request, wanted.fingerprint, reply, wanted.stream)
        known = self._ledger.open(job)
        if isinstance(known, Done):
            self._answers.outcome(reply, known.model_copy(update={"replayed": True}), job.key)
            message.ack()
        elif known is not None:
            self._journal.redirect(job.key, pack_reply(reply), partial(self._attached, known, message, reply))
        else:
            self._start(job, wanted, message)

    def _read(self, message: Incoming) -> Wanted:
        return read(message, chat=self._service.model.template is not None)

    def _attached(self, job: Job, message: Incoming, reply: Reply, error: QwedgeError | None) -> None:
        """A copy shares a job, and the journal knows where the answer is wanted now; on the journal's thread."""
        if error is not None:
            self._answers.refuse(reply, error)
        elif self._ledger.runs(job):
            self._answers.attached(job)
        message.ack()

    def _start(self, job: Job, wanted: Wanted, message: Incoming) -> None:
        try:
            self._journal.check()
            if message.redelivered:  # it may have ended the process before: it is stored before it runs
                entry = replace(pack(job, message), starts=0)
                self._journal.accept(entry, partial(self._stored_first, job, message))
            else:
                self._run(job, wanted, message)
                self._journal.accept(pack(job, message), partial(self._stored, job, message))
        except BaseException:
            self._ledger.close(job)
            raise

    def _stored(self, job: Job, message: Incoming, error: QwedgeError | None) -> None:
        """A job that runs is durable, or has to end; on the journal's thread."""
        self._answers.stored(job, ok=error is None)
        if error is not None:
            if job.ticket is not None:
                job.ticket.cancel()
            self._answers.refuse(self._ledger.close(job), error)
        message.ack()

    def _stored_first(self, job: Job, message: Incoming, error: QwedgeError | None) -> None:
        """A job that does not run yet is durable, or has to end; on the journal's thread."""
        self._answers.stored(job, ok=error is None)
        if error is None:
            self._resumer.put(job, message)
        else:
            self._answers.refuse(self._ledger.close(job), error)
        message.ack()

    def _has_room(self) -> bool:
        stats = self._service.stats()
        return stats.accepting and stats.num_waiting < stats.max_queue

    def _run_again(self, job: Job, message: Incoming) -> None:
        """Submit a stored request; on the resumer's thread."""
        wanted = self._read(message)
        job.stream = wanted.stream
        self._run(job, wanted, message)

    def _run(self, job: Job, wanted: Wanted, message: Incoming) -> None:
        job.answer, choices = wanted.prepare(self._service.model)
        deadline_s = _remaining_s(wanted.deadline_s, message.received_at)
        identity = f"mqtt:{job.request.client}"
        generations = [replace(choice, deadline_s=deadline_s, identity=identity) for choice in choices]
        job.ticket = self._service.submit_all(generations, partial(self._answers.put, job))
        if job.cancelled:  # meanwhile
            job.ticket.cancel()

    def _cancel(self, request: RequestId) -> None:
        """End a running request; its outcome is 499. One that has ended, or never was, stays as it is."""
        if job := self._ledger.find(request):
            job.cancelled = True
            if job.ticket is not None:
                job.ticket.cancel()


def _remaining_s(deadline_s: float | None, received_at: float) -> float | None:
    """What is left of a deadline that began at ``received_at``.

    Raises:
        DeadlineError: nothing.
    """
    if deadline_s is None:
        return None
    remaining = deadline_s - (time.monotonic() - received_at)
    if remaining <= 0:
        raise DeadlineError("the deadline passed before the request could start", hint="allow more time")
    return remaining
