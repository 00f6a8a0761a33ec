"""A request's body, for middleware that has to know it before the application reads it."""

from __future__ import annotations

from starlette.types import Message, Receive

from edge.errors import CancelledError


async def read_body(receive: Receive) -> bytes:
    """The whole body.

    Raises:
        CancelledError: the client went away.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CancelledError("the client went away")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def again(body: bytes, receive: Receive) -> Receive:
    """A channel whose body has been read, as it was before; ``receive`` gives what follows."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again
