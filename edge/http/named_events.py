"""An answer as named events, or whole: what Anthropic's API and OpenAI's responses have in common."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from edge.http.event_stream import comment, named_event
from edge.service import Event, Failed

log = logging.getLogger(__name__)


class Writer(Protocol):
    """Turns the service's events into those of an API; the whole answer grows with what a stream would tell."""

    @property
    def id(self) -> str:
        """The answer's."""

    def events(self, event: Event) -> Iterable[dict[str, Any]]:
        """What a stream tells of an event."""

    def body(self) -> dict[str, Any]:
        """The complete answer, after the end.

        Raises:
            QwedgeError: the request failed.
        """


async def complete(writer: Writer, stream: AsyncGenerator[tuple[int, Event], None]) -> dict[str, Any]:
    """The whole answer.

    Raises:
        QwedgeError: the request failed.
    """
    async with aclosing(stream):
        async for _, event in stream:
            for _told in writer.events(event):
                pass
    return writer.body()


async def server_sent(
    writer: Writer, first: tuple[int, Event], rest: AsyncGenerator[tuple[int, Event], None]
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events; the place in the queue is a comment, which clients skip."""
    async with aclosing(rest):
        yield _tell(writer, first[1])
        async for _, event in rest:
            yield _tell(writer, event)
            if isinstance(event, Failed):
                log.info("%s ended in mid-stream: %s", writer.id, event.error.code)


def _tell(writer: Writer, event: Event) -> bytes:
    return comment(event) + b"".join(map(named_event, writer.events(event)))
