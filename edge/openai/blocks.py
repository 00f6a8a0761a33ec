"""Splits an answer's text into content, reasoning and tool calls, in whatever pieces it arrives.

Reasoning is a ``<think>`` block at the very start. Tool calls are Hermes blocks, the form of Qwen2.5 and Qwen3::

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Köln"}}
    </tool_call>

Only a well-formed block is a call; a malformed or unclosed one stays what it is, content.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text from inside the ``<think>`` block."""

    text: str


@dataclass(frozen=True)
class Call:
    """A complete tool call."""

    index: int
    """Calls before it in the answer."""
    id: str
    name: str
    arguments: str
    """JSON text."""


Piece = Content | Reasoning | Call
State = Callable[[], Iterator[Piece]]


class BlockParser:
    """A state machine over the growing text; each state is a method that takes what it can from the buffer.

    Args:
        reasoning: look for a ``<think>`` block at the start.
        in_reasoning: the prompt has opened the ``<think>`` block already.
        tools: look for tool calls.
    """

    def __init__(self, *, reasoning: bool, in_reasoning: bool = False, tools: bool) -> None:
        self._tools = tools
        self._buffer = ""
        self._scanner = _StringScanner()
        self._num_calls = 0
        self._blanks = ""
        """White space before the open block: dropped before a call, kept before what turns out to be text."""
        self._state: State
        if in_reasoning:
            self._state = self._before_reasoning
        else:
            self._state = self._start if reasoning else self._content

    def push(self, text: str) -> list[Piece]:
        """Take more text; returns the pieces that became certain."""
        self._buffer += text
        return list(self._run())

    def flush(self) -> list[Piece]:
        """The text has ended; returns what was held back."""
        rest, self._buffer = self._buffer, ""
        if self._state in {self._before_reasoning, self._reasoning}:
            return [Reasoning(rest)] if rest.strip() else []
        if self._state == self._call:
            return [Content(self._blanks + _CALL + rest)]
        if not rest or (self._num_calls and not rest.strip()):
            return []
        return [Content(rest)]

    def _run(self) -> Iterator[Piece]:
        """Let the states work until one of them needs more text."""
        state = None
        while state != self._state:
            state = self._state
            yield from state()

    def _start(self) -> Iterator[Piece]:
        """Before the first visible character."""
        text = self._buffer.lstrip()
        if text.startswith(_THINK):
            self._buffer = text.removeprefix(_THINK)
            self._state = self._before_reasoning
        elif not _THINK.startswith(text):
            self._state = self._content
        yield from ()

    def _before_reasoning(self) -> Iterator[Piece]:
        return self._skip_line_breaks(self._reasoning)

    def _reasoning(self) -> Iterator[Piece]:
        """Inside ``<think>``; the line break before the end tag is not part of it."""
        text, found, rest = self._buffer.partition(_END_THINK)
        if found:
            self._buffer, self._state = rest, self._after_reasoning
            text = text.rstrip("\n")
        else:
            text, self._buffer = _split_certain(text, _END_THINK, "\n")
        if text:
            yield Reasoning(text)

    def _after_reasoning(self) -> Iterator[Piece]:
        return self._skip_line_breaks(self._content)

    def _skip_line_breaks(self, following: State) -> Iterator[Piece]:
        self._buffer = self._buffer.lstrip("\n")
        if self._buffer:
            self._state = following
        yield from ()

    def _content(self) -> Iterator[Piece]:
        """Free text; with tools, up to a ``<tool_call>``, without the white space before it."""
        if not self._tools:
            text, self._buffer = self._buffer, ""
        else:
            text, found, rest = self._buffer.partition(_CALL)
            if found:
                self._buffer, self._state, self._scanner = rest, self._call, _StringScanner()
                text, self._blanks = _split_end(text, text.rstrip())
            else:
                text, self._buffer = _split_certain(text, _CALL, None)
        if text:
            yield Content(text)

    def _call(self) -> Iterator[Piece]:
        """Inside ``<tool_call>``: wait for an end tag that is not part of a string."""
        end = self._scanner.find_outside_string(self._buffer, _END_CALL)
        if end < 0:
            return
        block, self._buffer = self._buffer[:end], self._buffer[end + len(_END_CALL) :]
        self._state = self._content
        call = parse_call(block, self._num_calls)
        self._num_calls += call is not None
        yield call or Content(self._blanks + _CALL + block + _END_CALL)
        # Text behind the block, or the next block, may be there already: `_run` sees that the state changed.


class _StringScanner:
    """Finds a tag outside of JSON strings, in a growing text, looking at every character once."""

    def __init__(self) -> None:
        self._position = 0
        self._in_string = False

    def find_outside_string(self, text: str, tag: str) -> int:
        """Index of ``tag``, or -1; ``text`` must extend the text of the last call."""
        i = self._position
        while i < len(text):
            character = text[i]
            if self._in_string and character == "\\":
                if i + 1 == len(text):
                    break
                i += 1
            elif character == '"':
                self._in_string = not self._in_string
            elif character == "<" and not self._in_string:
                if text.startswith(tag, i):
                    return i
                if tag.startswith(text[i:]):
                    break
            i += 1
        self._position = i
        return -1


def parse_call(block: str, index: int) -> Call | None:
    """The call in the text of a block, or None where it is malformed."""
    try:
        value = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    return Call(index, f"call_{uuid.uuid4().hex[:24]}", value["name"], _arguments(value.get("arguments", {})))


def _arguments(value: Any) -> str:
    """Arguments as JSON text; a string is JSON text already and not encoded twice."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _split_certain(text: str, tag: str, blanks: str | None) -> tuple[str, str]:
    """Split off an end that may belong to the tag: blanks, the beginning of the tag, or both in this order."""
    head = text
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            head = text[:-length]
            break
    return _split_end(text, head.rstrip(blanks))


def _split_end(text: str, head: str) -> tuple[str, str]:
    return head, text[len(head) :]
