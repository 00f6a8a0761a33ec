"""Server-sent events as a response."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge.errors import CancelledError
from edge.http.disconnect import unless_disconnected
from edge.service import Event, Queued


def comment(event: Event) -> bytes:
    """The place in the queue, as a comment that clients skip; nothing for other events."""
    if not isinstance(event, Queued):
        return b""
    return f": queued position={event.position} eta_s={event.eta_s:.1f}\n\n".encode()


def to_json(value: dict[str, Any]) -> bytes:
    """A value as the data of one event: UTF-8, in one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def named_event(value: dict[str, Any]) -> bytes:
    """One event that carries its type as its name too, as some APIs have it."""
    return b"event: %s\ndata: %s\n\n" % (value["type"].encode(), to_json(value))


class EventStream(Response):
    """A stream of server-sent events that stops its source when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        del scope
        with suppress(CancelledError):
            async with aclosing(self._lines):
                await unless_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines:
            if line:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class LineStream(EventStream):
    """The same as lines of JSON."""

    media_type = "application/x-ndjson"
