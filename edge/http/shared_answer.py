"""An answer that several copies of a request wait for: while it is made, and as it is stored."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, Final

from starlette.types import Message, Send

from edge.errors import QwedgeError
from edge.http.caller import Exchange

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES: Final = 4 << 20
"""A longer answer is not kept."""
_REPLAYED: Final = (b"idempotent-replayed", b"true")


class SharedAnswer:
    """One answer, for all who wait for it; on the event loop only.

    Args:
        fingerprint: of the request.
        exchange: of the request that came first.
    """

    def __init__(self, fingerprint: bytes, exchange: Exchange) -> None:
        self.fingerprint = fingerprint
        self.exchange = exchange
        self._messages: list[Message] = []
        self._last: Message | None = None  # held back until the journal has the answer
        self._is_replay = False
        self._error: QwedgeError | None = None
        self._ended = False
        self._changed = asyncio.Event()

    async def take(self, message: Message) -> None:
        """What the application sends."""
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._last = message
            return
        self._messages.append(message)
        self._wake()

    def replay(self, stored: bytes) -> None:
        """Take a stored answer."""
        head, _, body = stored.partition(b"\n")
        start: dict[str, Any] = json.loads(head)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in start["headers"]]
        self._messages = [{"type": "http.response.start", "status": start["status"], "headers": headers}]
        self._last = {"type": "http.response.body", "body": body, "more_body": False}
        self._is_replay = True
        self.end()

    def outcome(self) -> bytes | None:
        """The answer to be stored; None where a copy may try again."""
        if not self._messages or self._messages[0]["status"] != 200 or self._last is None or self.exchange.failed:
            return None
        parts = [message.get("body", b"") for message in (*self._messages[1:], self._last)]
        if sum(map(len, parts)) > MAX_ANSWER_BYTES:
            log.warning("%s is not kept: its answer is longer than %d bytes", self.exchange.id, MAX_ANSWER_BYTES)
            return None
        start = self._messages[0]
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]]
        return json.dumps({"status": start["status"], "headers": headers}).encode() + b"\n" + b"".join(parts)

    def fail(self, error: QwedgeError) -> None:
        """There is no answer, or no more of it."""
        self._error = error
        self.end()

    def end(self) -> None:
        """The answer is complete, or there is none."""
        if self._last is not None and not self._ended:
            self._messages.append(self._last)
        self._ended = True
        self._wake()

    async def follow(self, send: Send, *, replayed: bool) -> None:
        """Send the answer from its beginning to its end.

        Raises:
            QwedgeError: there is none.
        """
        position = 0
        while True:
            changed = self._changed
            for message in self._messages[position:]:
                position += 1
                await send(_marked(message) if replayed or self._is_replay else dict(message))
            if self._ended and position == len(self._messages):
                break
            if position == len(self._messages):
                await changed.wait()
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _marked(message: Message) -> Message:
    """A message of an answer that was made for an earlier request."""
    if message["type"] != "http.response.start":
        return dict(message)
    return {**message, "headers": [*message["headers"], _REPLAYED]}
