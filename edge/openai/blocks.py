"""Splits an answer's text into content, reasoning and tool calls, in whatever pieces it arrives.

Reasoning is a ``<think>`` block at the very start. Tool calls are ``<tool_call>`` blocks; what stands in them is up to
the model: JSON (:mod:`edge.openai.json_calls`) or XML (:mod:`edge.openai.xml_calls`). A block in which no call can be
made out stays what it is, content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from edge.openai.json_calls import JsonCallReader
from edge.openai.pieces import Arguments, Call, Content, Piece, Reasoning

__all__ = ["Arguments", "BlockParser", "Call", "CallReader", "Content", "Piece", "Reasoning"]

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"


class CallReader(Protocol):
    """Reads the text of one block."""

    called: bool
    """Whether a call was found."""
    raw: str
    """The text of the block so far, where it is no call."""
    rest: str | None
    """Text behind the block; None while it is open."""

    def push(self, text: str) -> Iterator[Piece]:
        """Take more text; gives the pieces that became certain."""
        ...

    def flush(self) -> Iterator[Piece]:
        """The text has ended; gives what was held back."""
        ...


State = Callable[[], Iterator[Piece]]


class BlockParser:
    """A state machine over the growing text; each state is a method that takes what it can from the buffer.

    Args:
        reasoning: look for a ``<think>`` block at the start.
        in_reasoning: the prompt has opened the ``<think>`` block already.
        tools: look for tool calls.
        calls: makes a reader for each block, given the number of calls before it.
    """

    def __init__(
        self,
        *,
        reasoning: bool,
        in_reasoning: bool = False,
        tools: bool,
        calls: Callable[[int], CallReader] = JsonCallReader,
    ) -> None:
        self._tools = tools
        self._new_reader = calls
        self._buffer = ""
        self._num_calls = 0
        self._reader = calls(0)  # of the open block, where there is one
        self._blanks = ""
        """White space before the open block: dropped before a call, kept before what turns out to be text."""
        self._state: State
        if in_reasoning:
            self._state = self._before_reasoning
        else:
            self._state = self._start if reasoning else self._content

    @property
    def in_reasoning(self) -> bool:
        """Whether the text is inside the ``<think>`` block."""
        return self._state in {self._before_reasoning, self._reasoning}

    def push(self, text: str) -> list[Piece]:
        """Take more text; returns the pieces that became certain."""
        self._buffer += text
        return list(self._run())

    def flush(self) -> list[Piece]:
        """The text has ended; returns what was held back."""
        rest, self._buffer = self._buffer, ""
        if self.in_reasoning:
            return [Reasoning(rest)] if rest.strip() else []
        if self._state == self._call:
            return list(self._reader.flush()) if self._reader.called else [Content(self._opening + self._reader.raw)]
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
                self._buffer, self._state, self._reader = rest, self._call, self._new_reader(self._num_calls)
                text, self._blanks = _split_end(text, text.rstrip())
            else:
                text, self._buffer = _split_certain(text, _CALL, None)
        if text:
            yield Content(text)

    def _call(self) -> Iterator[Piece]:
        """Inside ``<tool_call>``, up to its end tag."""
        text, self._buffer = self._buffer, ""
        yield from self._reader.push(text)
        if self._reader.rest is None:
            return
        # Text behind the block, or the next block, may be there already: `_run` sees that the state changed.
        self._buffer, self._state = self._reader.rest, self._content
        if self._reader.called:
            self._num_calls += 1
        else:
            yield Content(self._opening + self._reader.raw + _END_CALL)

    @property
    def _opening(self) -> str:
        """What stands before the open block's text, where it is no call."""
        return self._blanks + _CALL


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
