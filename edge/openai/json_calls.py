"""Tool calls in Hermes' form, of Qwen2.5 and Qwen3, read while they arrive.

A block looks like this::

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Köln"}}
    </tool_call>

A call becomes known once its name and the beginning of its arguments are there; what follows is passed on as it comes.
Everything unusual, such as the arguments before the name, waits for the end of the block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from edge.openai.pieces import Arguments, Call, Piece, new_call_id

END = "</tool_call>"
_HEAD = re.compile(
    r'\s{0,64}\{\s{0,64}"name"\s{0,8}:\s{0,8}("(?:[^"\\]|\\.){1,512}")\s{0,8},\s{0,8}"arguments"\s{0,8}:\s{0,8}(?=\{)'
)
"""A block up to its arguments, where these are an object. Bounded, as it is tried with every piece of text."""


class JsonCallReader:
    """Reads the text of one block, from behind its start tag.

    Args:
        index: calls before it in the answer.
    """

    def __init__(self, index: int) -> None:
        self.called = False
        """Whether a call was found."""
        self.rest: str | None = None
        """Text behind the end tag; None while the block is open."""
        self.raw = ""
        """The text of the block so far: what it is where it is no call."""
        self._index = index
        self._scanner = _Scanner()
        self._num_told = 0  # characters of the block that are behind us: head and arguments

    def push(self, text: str) -> Iterator[Piece]:
        """Take more text; gives the pieces that became certain."""
        self.raw += text
        if not self.called and (head := _HEAD.match(self.raw)) and (name := _decoded(head[1])):
            self.called = True
            self._num_told = head.end()
            self._scanner.start_value(head.end())
            yield Call(self._index, new_call_id(), name, "")
        end = self._scanner.scan(self.raw)
        if self.called and (arguments := self.raw[self._num_told : self._scanner.value_end]):
            self._num_told += len(arguments)
            yield Arguments(self._index, arguments)
        if end >= 0:
            self.raw, self.rest = self.raw[:end], self.raw[end + len(END) :]
            if not self.called and (call := parse_call(self.raw, self._index)):
                self.called = True
                yield call

    def flush(self) -> Iterator[Piece]:
        """The text has ended; nothing was held back."""
        yield from ()


class _Scanner:
    """Walks through growing text once, to the end tag outside of strings, and to the end of the arguments."""

    def __init__(self) -> None:
        self._position = 0
        self._in_string = False
        self._depth: int | None = None
        self._closed_at: int | None = None

    @property
    def value_end(self) -> int:
        """How far the arguments reach in the text that was scanned."""
        return self._position if self._closed_at is None else self._closed_at

    def start_value(self, position: int) -> None:
        """The arguments begin here; no string is open."""
        self._position, self._in_string, self._depth, self._closed_at = position, False, 0, None

    def scan(self, text: str) -> int:
        """Index of the end tag, or -1; ``text`` must extend the text of the last call."""
        i = self._position
        while i < len(text):
            character = text[i]
            if self._in_string and character == "\\":
                if i + 1 == len(text):
                    break
                i += 1
            elif character == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                if character == "<" and text.startswith(END, i):
                    self._position = i
                    return i
                if character == "<" and END.startswith(text[i:]):
                    break
                self._nest(character, i)
            i += 1
        self._position = i
        return -1

    def _nest(self, character: str, position: int) -> None:
        if self._depth is None or self._closed_at is not None:
            return
        self._depth += (character in "{[") - (character in "}]")
        if self._depth == 0 and character in "}]":
            self._closed_at = position + 1


def parse_call(block: str, index: int) -> Call | None:
    """The call in the text of a whole block, or None where it is malformed."""
    value = _decoded(block)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    return Call(index, new_call_id(), value["name"], _arguments(value.get("arguments", {})))


def _decoded(text: str) -> Any:
    """A JSON value, or None where there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _arguments(value: Any) -> str:
    """Arguments as JSON text; a string is JSON text already and not encoded twice."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
