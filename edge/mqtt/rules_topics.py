"""Topic filters: what they match, whether they have a topic in common, and how to subscribe to several."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest


def match(topic_filter: str, topic: str) -> tuple[str, ...] | None:
    """What the wildcards of a filter stand for in a topic; None where it does not match."""
    parts, levels = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$"):
        return None  # no wildcard matches the broker's own topics, and no filter names them
    captures: list[str] = []
    for index, part in enumerate(parts):
        if part == "#":
            return (*captures, "/".join(levels[index:]))
        if index >= len(levels) or part not in {"+", levels[index]}:
            return None
        if part == "+":
            captures.append(levels[index])
    return tuple(captures) if len(parts) == len(levels) else None


def overlap(one: str, other: str) -> bool:
    """Whether any topic matches both filters; ``#`` may stand anywhere and for any number of levels."""
    return _overlap(one.split("/"), other.split("/"))


def disjoint(filters: Iterable[str]) -> tuple[str, ...]:
    """Filters that match whatever these match, and no topic twice; those that overlap become a wider one.

    With MQTT 5, brokers send a message once for each filter that it matches: it would be answered as often.
    """
    found: list[str] = []
    for each in filters:
        wide = each
        while other := next((known for known in found if overlap(known, wide)), None):
            found.remove(other)
            wide = _join(other, wide)
        found.append(wide)
    return tuple(found)


def _overlap(one: list[str], other: list[str]) -> bool:
    if not one or not other:
        return set(one) | set(other) <= {"#"}
    if one[0] == "#" or other[0] == "#":
        return _overlap(one[1:], other) or _overlap(one, other[1:])
    return (one[0] == other[0] or "+" in {one[0], other[0]}) and _overlap(one[1:], other[1:])


def _join(one: str, other: str) -> str:
    """The narrowest filter that matches whatever these two match."""
    levels: list[str] = []
    for pair in zip_longest(one.split("/"), other.split("/")):
        if None in pair or "#" in pair:
            return "/".join([*levels, "#"])
        levels.append(pair[0] if pair[0] == pair[1] else "+")
    return "/".join(levels)
