"""Runs requests again that the journal held over a crash, one after another.

One after another, so that the request that ends the process, if one does, is the one whose start was counted last, and
does not take others with it: a request whose :data:`MAX_STARTS` runs have all ended in a crash is answered with an
error. A message that the broker sends a second time goes the same way, as it may have ended the process before it could
be stored.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from edge.errors import CancelledError, CrashedError, EngineError, OverloadedError, QwedgeError, UnavailableError
from edge.journal import Entry, Journal
from edge.mqtt.answers import Answers
from edge.mqtt.ledger import Job, Ledger
from edge.mqtt.messages import Done
from edge.mqtt.packets import Incoming
from edge.mqtt.stored import is_ours, unpack_job, unpack_message
from edge.mqtt.topics import Layout

log = logging.getLogger(__name__)

MAX_STARTS: Final = 2
"""Runs of one request that may end with the process."""
_LOOK_S: Final = 0.5
"""Pause between two looks at a journal that cannot be read yet, or at a queue without room."""

Run = Callable[[Job, Incoming], None]
"""Submits a job that is in the ledger and in the journal; raises what :meth:`edge.service.Service.submit_all` does."""


@dataclass(frozen=True)
class _Waiting:
    job: Job
    message: Incoming
    starts: int
    """Runs that were begun."""


class Resumer:
    """Takes up at the start what was not answered before, and runs it carefully.

    Args:
        layout: our topics.
        journal: open when this starts.
        ledger: knows the jobs.
        answers: publishes what becomes of them.
        run: submits a job.
        has_room: whether it may be submitted now.
        max_starts: runs of one request that may end with the process.
    """

    def __init__(
        self,
        layout: Layout,
        journal: Journal,
        ledger: Ledger,
        answers: Answers,
        *,
        run: Run,
        has_room: Callable[[], bool],
        max_starts: int = MAX_STARTS,
    ) -> None:
        self._layout = layout
        self._journal = journal
        self._ledger = ledger
        self._answers = answers
        self._run = run
        self._has_room = has_room
        self._max_starts = max_starts
        self._waiting: deque[_Waiting] = deque()
        self._taken_up = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take up what the journal holds, before anything new arrives, and start the thread."""
        self._look()
        self._thread = threading.Thread(target=self._work, name="mqtt-resume", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave what has not begun in the journal, for the next start, and end the thread."""
        self._stopping.set()
        self._ledger.wake()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self._waiting:
            self._ledger.close(self._waiting.popleft().job)

    def put(self, job: Job, message: Incoming) -> None:
        """Run a job that is in the ledger and in the journal, with no start counted; from any thread."""
        self._waiting.append(_Waiting(job, message, 0))
        self._ledger.wake()

    def _take_up(self, entries: list[Entry]) -> None:
        for entry in filter(is_ours, entries):
            try:
                self._take_up_one(entry)
            except Exception:  # a disk may change what it holds: one unreadable request must not end every start
                log.exception("a stored request cannot be read; it is forgotten")
                self._journal.settle(entry.key, entry.reply, None, lambda _error: None)
        if self._waiting:
            log.warning("%d requests were not answered before the restart: running them now", len(self._waiting))

    def _take_up_one(self, entry: Entry) -> None:
        job = unpack_job(entry)
        if entry.outcome is not None:
            self._answers.outcome(job.reply, Done.model_validate_json(entry.outcome), entry.key)
            return
        message = unpack_message(entry, job, self._layout)
        if self._ledger.adopt(job):
            self._waiting.append(_Waiting(job, message, entry.starts))

    # --- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._taken_up:
            if self._stopping.wait(_LOOK_S):
                return
            self._look()
        while self._await(lambda: bool(self._waiting)):
            waiting = self._waiting[0]
            if self._resume(waiting):
                self._waiting.popleft()
                self._await(partial(self._has_ended, waiting.job))

    def _look(self) -> None:
        entries = self._journal.entries()
        if entries is not None:
            self._taken_up = True
            self._take_up(entries)

    def _await(self, condition: Callable[[], bool]) -> bool:
        """Wait until something is so; returns False if we are to stop."""
        self._ledger.wait(lambda: condition() or self._stopping.is_set())
        return not self._stopping.is_set()

    def _has_ended(self, job: Job) -> bool:
        return not self._ledger.runs(job)

    def _resume(self, waiting: _Waiting) -> bool:
        """Run a request or end it; returns False where it has to wait, here or for the next start."""
        job = waiting.job
        try:
            self._check(waiting)
            if not (self._has_room() and self._count(waiting)):
                return self._pause()
            self._run(job, waiting.message)
        except (OverloadedError, UnavailableError):
            return self._pause()
        except QwedgeError as error:
            self._answers.end(job, error)
        except Exception:  # whatever was stored, the next one is run
            log.exception("a stored request could not be run")
            self._answers.end(job, EngineError("the request could not be taken", hint="see the device's log"))
        return True

    def _pause(self) -> Literal[False]:
        self._stopping.wait(_LOOK_S)
        return False

    def _count(self, waiting: _Waiting) -> bool:
        """Note the start in the journal; returns False if we are told to stop meanwhile."""
        counted = threading.Event()

        def then(_error: QwedgeError | None) -> None:
            counted.set()
            self._ledger.wake()

        self._journal.start(waiting.job.key, waiting.starts + 1, then)
        return self._await(counted.is_set)

    def _check(self, waiting: _Waiting) -> None:
        """Whether a request should run.

        Raises:
            CrashedError: it has ended the process before, or was there when it ended, too often.
            CancelledError: the client does not want the answer any more.
        """
        if waiting.starts >= self._max_starts:
            hint = "if it was not this request's fault, send it under a new id"
            raise CrashedError("the process ended each time this request ran", hint=hint)
        if waiting.job.cancelled:
            raise CancelledError("the request was cancelled")
