"""The bounded queue between the network thread and the intake thread."""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from edge.mqtt.packets import Incoming

MAX_MESSAGES: Final = 256
MAX_BYTES: Final = 8 << 20


class Inbox:
    """Messages that wait to be looked at, bounded by number and by bytes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._messages: deque[Incoming] = deque()
        self._bytes = 0
        self._closed = False

    def put(self, message: Incoming) -> bool:
        """Add a message; returns False where there is no room for it, or after :meth:`close`."""
        size = len(message.payload or b"")
        with self._changed:
            if self._closed or len(self._messages) >= MAX_MESSAGES or self._bytes + size > MAX_BYTES:
                return False
            self._messages.append(message)
            self._bytes += size
            self._changed.notify()
            return True

    def get(self) -> Incoming | None:
        """The oldest message, as soon as there is one; None when the inbox is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages or self._closed)
            if not self._messages:
                return None
            message = self._messages.popleft()
            self._bytes -= len(message.payload or b"")
            return message

    def close(self) -> None:
        """Let :meth:`get` return None after the last message."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
