"""The newest messages of a connection, for those who look whether MQTT works: topics and sizes, never a payload."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Final, Literal

from edge.mqtt.topics import PROTOCOL_VERSION

MAX_MESSAGES: Final = 100
MAX_TOPIC: Final = 256
"""Characters of a topic that are kept."""
_KIND_AT: Final = {"dev": 2, "pool": 2, "res": 3}
"""Which level below the root tells what a message is, by the first one."""

Direction = Literal["in", "out"]


@dataclass(frozen=True)
class TracedMessage:
    """A message that was received or published, or several that followed each other on one topic."""

    number: int
    """Of the last one: 1, 2, 3, ... since the start."""
    time: float
    """Of the last one; seconds since 1970."""
    direction: Direction
    topic: str
    kind: str
    """The protocol's word (``req``, ``evt``, ``done``, ``status``, ...); ``other`` outside of the protocol."""
    bytes: int
    """Size of the payloads."""
    count: int = 1
    """How many they are."""


class Trace:
    """A bounded ring of messages; safe to use from any thread.

    Args:
        root: first level(s) of the protocol's topics.
        capacity: messages that are kept.
    """

    def __init__(self, root: str, capacity: int = MAX_MESSAGES) -> None:
        self._branch = f"{root}/v{PROTOCOL_VERSION}/"
        self._lock = threading.Lock()
        self._messages: deque[TracedMessage] = deque(maxlen=capacity)  # guarded by _lock, like the number
        self._number = 0

    def add(self, direction: Direction, topic: str, num_bytes: int) -> None:
        """Note a message."""
        kind, now = self._kind(topic), time.time()
        with self._lock:
            self._number += 1
            message = TracedMessage(self._number, now, direction, topic[:MAX_TOPIC], kind, num_bytes)
            if self._messages and _same_topic(self._messages[-1], message):
                # The load of an idle evening, or the pieces of one answer, must not push out all else.
                last = self._messages.pop()
                message = replace(message, bytes=last.bytes + num_bytes, count=last.count + 1)
            self._messages.append(message)

    def messages(self) -> list[TracedMessage]:
        """What is kept, oldest first."""
        with self._lock:
            return list(self._messages)

    def _kind(self, topic: str) -> str:
        levels = topic.removeprefix(self._branch).split("/")
        at = _KIND_AT.get(levels[0])
        if at is None or len(levels) <= at or not topic.startswith(self._branch):
            return "other"
        return levels[at]


def _same_topic(one: TracedMessage, other: TracedMessage) -> bool:
    return (one.direction, one.topic) == (other.direction, other.topic)
