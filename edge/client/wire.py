"""What passes between a request and the transport that carries it, whatever the transport is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from edge.errors import CancelledError


@dataclass(frozen=True)
class Question:
    """A request, the same in all its copies."""

    id: str
    """Names it among the client's requests: 1 to 64 letters, digits, ``.``, ``_`` and ``-``."""
    body: Mapping[str, Any]
    """As OpenAI's API has it."""
    stream: bool
    """Whether text is wanted as it comes."""


@dataclass(frozen=True)
class Progress:
    """The request is known to somebody who will answer it."""

    name: str
    """``accepted``, ``queued`` or ``started``; over HTTP ``sent`` or ``queued``."""
    device: str | None = None
    """Who, with ``accepted`` over MQTT."""
    position: int | None = None
    """With ``queued``: requests ahead of this one."""
    eta_s: float | None = None
    """With ``queued``: estimated seconds until it starts."""


@dataclass(frozen=True)
class Text:
    """The next piece of the answer."""

    seq: int
    """0, 1, 2, ... in each run of the request; a gap is a lost piece."""
    text: str


@dataclass(frozen=True)
class Ended:
    """The outcome of one copy of the request."""

    status: int
    """As in HTTP."""
    body: Mapping[str, Any]
    """OpenAI's answer, or its error object."""
    retry_after_s: float | None = None
    replayed: bool = False
    """It was answered before, and not run again."""


@dataclass(frozen=True)
class Lost:
    """The copy may have reached nobody, or its answer may not reach us: it must be sent again."""

    reason: str


Event = Progress | Text | Ended | Lost
Tell = Callable[[Event], None]
"""Takes an event from any thread; must only enqueue it."""


class Call(Protocol):
    """One request's way to whoever answers it."""

    @property
    def first_word_s(self) -> tuple[float, float]:
        """How long a copy may stay without any word before it is sent again: the first one, and the longest of all."""

    def send(self, attempt: int, remaining_s: float | None) -> None:
        """Send a copy, or ask after the one that is being answered.

        Args:
            attempt: 1, 2, 3, ...
            remaining_s: how long an answer is of use; None = for ever.
        """

    def cancel(self) -> None:
        """End the request wherever it is."""

    def close(self) -> None:
        """No event is of interest any more."""


class Transport(Protocol):
    """Carries requests to a server or a broker; safe to use from any thread."""

    def connect(self) -> None:
        """Make sure that there is somebody to talk to; blocks until it is so.

        Raises:
            UnavailableError: there is nobody.
        """

    def check(self) -> None:
        """Look whether a request could be answered now.

        Raises:
            UnavailableError: nobody is there who could.
        """

    def call(self, question: Question, tell: Tell) -> Call:
        """Prepare a request; nothing is sent yet.

        Raises:
            RequestError: the id is not allowed, or is in use.
        """

    def close(self) -> None:
        """Cancel what runs, and disconnect."""


CLOSED: Final = Ended(CancelledError.status, {"error": {"message": "the client was closed"}})
"""What requests that run hear when their transport is closed."""
