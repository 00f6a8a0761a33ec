"""One request from its first copy to its end, as a protocol without input and output.

:meth:`Exchange.steps` is a generator that whoever has a thread or an event loop drives: it yields text to hand on, or
the number of seconds to wait for the next event, which is sent into it (None where none came). So the rules stand here
once, for blocking and for asynchronous clients and for all transports:

- A copy that nobody answers is sent again under the same id, later and later. It is safe: who knows the id attaches
  the copy, or gives the answer again.
- 429 and 503 say when to come back. A failure (500) is tried once more. Everything else is final.
- Whoever leaves the generator before the end cancels the request.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from typing import Any, Final

from edge.client.answer import Assembler, error_of, text_of
from edge.client.wire import Call, Ended, Event, Lost, Progress, Text
from edge.errors import DeadlineError, QwedgeError, UnavailableError

SILENCE_S: Final = 20.0
"""How long a request that somebody works on may say nothing before it is asked after."""
BACKOFF_S: Final = (0.1, 0.5)
"""First and longest pause before a copy that reached nobody is sent again, before jitter."""
MAX_FAILURES: Final = 2
"""Runs that may end with 500."""
_POLL_S: Final = 3600.0

OnProgress = Callable[[Progress], None]
Steps = Generator[float | str, Event | None, None]


class Exchange:
    """The life of one request.

    Args:
        call: the way to whoever answers.
        timeout_s: seconds until the request is given up; None = never.
        on_progress: gets what is known about it.
    """

    def __init__(self, call: Call, timeout_s: float | None, on_progress: OnProgress | None = None) -> None:
        self._call = call
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._on_progress = on_progress
        self._text = Assembler()
        self.outcome: Ended | None = None
        """How it ended, be it an answer or not."""
        self._attempt = 0
        self._accepted = False
        """Whether anybody ever worked on it."""
        self._num_unanswered = 0
        """Copies in a row that nobody said a word about."""
        self._num_lost = 0
        """Copies in a row that reached nobody."""
        self._num_failures = 0
        self._obstacle: QwedgeError | None = None
        """Why there is no answer yet."""
        self._resend_at = 0.0

    def steps(self) -> Steps:
        """Send, listen, send again, until there is an :attr:`outcome`.

        Raises:
            DeadlineError: there was none in time.
            OverloadedError, UnavailableError: the same, as nobody had room, or nobody was there.
        """
        try:
            yield from self._until_outcome()
        finally:
            if self.outcome is None:
                self._call.cancel()
            self._call.close()

    def answer(self) -> dict[str, Any]:
        """OpenAI's answer, after the end.

        Raises:
            QwedgeError: the request failed.
        """
        assert self.outcome is not None
        if self.outcome.status != 200:
            raise error_of(self.outcome)
        return dict(self.outcome.body)

    def rest(self) -> str:
        """The text of the answer that was not handed on yet.

        Raises:
            AnswerChangedError: see :class:`~edge.client.answer.Assembler`.
        """
        return self._text.rest(text_of(self.answer()))

    def _until_outcome(self) -> Steps:
        while self.outcome is None:
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                raise self._too_late()
            if now >= self._resend_at:
                self._send(now)
            event = yield max(0.0, min(self._resend_at, self._deadline or now + _POLL_S) - now)
            if isinstance(event, Ended) and self._is_final(event):
                self.outcome = event
            elif event is not None and (text := self._take(event)):
                yield text

    def _send(self, now: float) -> None:
        first, longest = self._call.first_word_s
        self._resend_at = now + min(first * 2.0 ** min(self._num_unanswered, 16), longest)
        self._attempt += 1
        self._num_unanswered += 1
        self._call.send(self._attempt, None if self._deadline is None else self._deadline - now)

    def _take(self, event: Event) -> str:
        """What an event that is not the end changes; returns the text that it adds."""
        match event:
            case Progress():
                self._alive()
                if self._on_progress is not None:
                    self._on_progress(event)
            case Text():
                self._alive()
                return self._text.take(event)
            case Ended():
                self._num_unanswered = 0
                self._obstacle = error_of(event)
                self._num_lost += event.retry_after_s is None
                pause = event.retry_after_s or self._backoff_s()
                self._resend_at = time.monotonic() + pause * random.uniform(1.0, 1.2)  # noqa: S311 - no secret
            case Lost():
                hint = "is it switched on, and does it have room?"
                self._obstacle = UnavailableError(event.reason, hint=hint)
                self._num_lost += 1
                self._resend_at = time.monotonic() + self._backoff_s()
        return ""

    def _alive(self) -> None:
        """Somebody works on it."""
        self._accepted = True
        self._num_unanswered = 0
        self._num_lost = 0
        self._obstacle = None
        self._resend_at = time.monotonic() + SILENCE_S

    def _is_final(self, outcome: Ended) -> bool:
        match outcome.status:
            case 429 | 503:
                return False
            case 500:
                self._num_failures += 1
                return self._num_failures >= MAX_FAILURES
            case _:
                return True

    def _backoff_s(self) -> float:
        first, longest = BACKOFF_S
        return random.uniform(0.5, 1.0) * min(first * 2.0 ** min(self._num_lost, 16), longest)  # noqa: S311 - no secret

    def _too_late(self) -> QwedgeError:
        if self._obstacle is not None:
            return self._obstacle
        if self._accepted:
            return DeadlineError(f"there was no answer within {self._timeout_s:g} s", hint="allow more time")
        return UnavailableError(f"nobody took the request within {self._timeout_s:g} s", hint="is the device there?")
