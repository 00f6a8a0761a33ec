"""Which messages of a rule are worth an answer, and when: debouncing, rate, change, and a bound on what waits."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Literal

from edge.mqtt.rules import RuleMessage
from edge.settings.rules import RuleSettings

MAX_TOPICS: Final = 1024
"""Topics of a rule whose last answer is remembered."""

Fate = Literal["unchanged", "superseded", "dropped"]
"""Why a message gets no answer."""


@dataclass(frozen=True)
class _Waiting:
    message: RuleMessage
    due: float


@dataclass(frozen=True)
class _Last:
    """What was answered last on a topic."""

    at: float
    digest: bytes


class Gate:
    """Messages of one rule between their arrival and their answer; not thread-safe.

    Times are seconds of a clock of the caller's.

    Args:
        settings: the rule's table.
    """

    def __init__(self, settings: RuleSettings) -> None:
        self._settings = settings
        # By topic where only the newest message of a topic counts, else by the order of arrival.
        self._by_topic = settings.debounce_s > 0 or settings.min_interval_s > 0
        self._waiting: OrderedDict[str | int, _Waiting] = OrderedDict()
        self._last: OrderedDict[str, _Last] = OrderedDict()
        self._num_offered = 0

    def __len__(self) -> int:
        """Messages that wait."""
        return len(self._waiting)

    @property
    def next_due(self) -> float | None:
        """When the next message may be taken; None where none waits."""
        return min((each.due for each in self._waiting.values()), default=None)

    def offer(self, message: RuleMessage, now: float) -> list[Fate]:
        """A message arrived.

        Returns:
            The fate of this message or of an older one, where one of them gets no answer because of it.
        """
        self._num_offered += 1
        key: str | int = message.topic if self._by_topic else self._num_offered
        due = now + self._settings.debounce_s
        if last := self._last.get(message.topic):
            due = max(due, last.at + self._settings.min_interval_s)
        if key in self._waiting:
            self._waiting[key] = _Waiting(message, due)
            return ["superseded"]
        if len(self._waiting) < self._settings.max_queue:
            self._waiting[key] = _Waiting(message, due)
            return []
        if self._settings.when_full == "drop-oldest":
            self._waiting.popitem(last=False)
            self._waiting[key] = _Waiting(message, due)
        return ["dropped"]

    def take(self, now: float) -> tuple[RuleMessage | None, list[Fate]]:
        """The oldest message that is due, and the fates of those that were skipped."""
        fates: list[Fate] = []
        for key in [key for key, each in self._waiting.items() if each.due <= now]:
            message = self._waiting.pop(key).message
            digest = hashlib.sha256(message.payload or b"").digest()
            last = self._last.get(message.topic)
            if self._settings.on_change and last is not None and last.digest == digest:
                fates.append("unchanged")
                continue
            self._remember(message.topic, _Last(now, digest))
            return message, fates
        return None, fates

    def put_back(self, message: RuleMessage, due: float) -> list[Fate]:
        """A message that was taken could not be tried: it is the next one again, unless a newer one counts."""
        self.forget(message)
        self._num_offered += 1
        key: str | int = message.topic if self._by_topic else self._num_offered
        if key in self._waiting:
            return ["superseded"]
        self._waiting[key] = _Waiting(message, due)
        self._waiting.move_to_end(key, last=False)
        return []

    def forget(self, message: RuleMessage) -> None:
        """A message that was taken got no answer: the same payload may be tried again."""
        if last := self._last.get(message.topic):
            self._last[message.topic] = _Last(last.at, b"")

    def clear(self) -> int:
        """Let go of all that waits; returns their number."""
        number = len(self._waiting)
        self._waiting.clear()
        return number

    def _remember(self, topic: str, last: _Last) -> None:
        self._last[topic] = last
        self._last.move_to_end(topic)
        if len(self._last) > MAX_TOPICS:
            self._last.popitem(last=False)
