"""The one answer to a request, whole or streamed: what the APIs of Anthropic, Ollama and OpenAI's responses share."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge.http.caller import exchange_of
from edge.http.disconnect import unless_disconnected
from edge.http.event_stream import EventStream, LineStream, comment, named_event, to_json
from edge.service import Event, Failed

log = logging.getLogger(__name__)


class Writer(Protocol):
    """Turns the service's events into those of an API; the whole answer grows with what a stream would tell."""

    def events(self, event: Event) -> Iterable[dict[str, Any]]:
        """What a stream tells of an event."""

    def body(self) -> dict[str, Any]:
        """The complete answer, after the end.

        Raises:
            QwedgeError: the request failed.
        """


@dataclass(frozen=True)
class Form:
    """How a stream looks on the wire."""

    response: type[EventStream]
    tell: Callable[[Event, Iterable[dict[str, Any]]], bytes]
    """From an event of the service, and what the API makes of it."""


NAMED_EVENTS: Final = Form(EventStream, lambda event, told: comment(event) + b"".join(map(named_event, told)))
"""Server-sent events; the place in the queue is a comment, which clients skip."""
LINES: Final = Form(LineStream, lambda _event, told: b"".join(to_json(each) + b"\n" for each in told))


async def respond(
    request: Request, writer: Writer, stream: AsyncGenerator[tuple[int, Event], None], form: Form | None
) -> Response:
    """Make a response of the service's events.

    Args:
        request: that is answered.
        writer: knows the API.
        stream: the events.
        form: of the stream; None = the answer is sent whole.

    Raises:
        QwedgeError: the request was refused, or failed before anything was sent.
    """
    if form is None:
        return JSONResponse(await unless_disconnected(request.receive, _complete(writer, stream)))
    first = await anext(stream)  # a refusal is raised here, while the status can still say so
    return form.response(_streamed(request, writer, first, stream, form))


async def _complete(writer: Writer, stream: AsyncGenerator[tuple[int, Event], None]) -> dict[str, Any]:
    async with aclosing(stream):
        async for _, event in stream:
            for _told in writer.events(event):
                pass
    return writer.body()


async def _streamed(
    request: Request,
    writer: Writer,
    first: tuple[int, Event],
    rest: AsyncGenerator[tuple[int, Event], None],
    form: Form,
) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield form.tell(first[1], writer.events(first[1]))
        async for _, event in rest:
            yield form.tell(event, writer.events(event))
            if isinstance(event, Failed):
                log.info("%s ended in mid-stream: %s", exchange_of(request).id, event.error.code)
