"""Tool calls in the form of Qwen3-Coder and Qwen3.5, read while they arrive.

A block looks like this::

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Köln
    </parameter>
    </function>
    </tool_call>

The text of a parameter has no quotes: the tool's schema tells whether ``7`` is a number or a string. Strings are passed
on as they come, all other values once they are complete. An end tag inside of a value is text, unless what a call goes
on with follows it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from edge.engine.argument_types import fixed_values, parameters_of, type_of, types_of, written
from edge.openai.pieces import Arguments, Call, Piece, new_call_id

END = "</tool_call>"
_FUNCTION = re.compile(r"\s{0,64}<function=([^>\n]{1,256})>")
_PARAMETER = re.compile(r"<parameter=([^>\n]{1,256})>")
_END_FUNCTION, _END_PARAMETER = "</function>", "</parameter>"
_FOLLOWING = ("<parameter=", _END_FUNCTION, END)
"""What may stand behind a parameter."""
_END_VALUE = re.compile(rf"\n?{_END_PARAMETER}\s*(?={'|'.join(_FOLLOWING)})")
_WORDS = {"true": True, "false": False, "null": None, "none": None}
"""As JSON and as Python spell them, in lower case."""

Schemas = Mapping[str, Mapping[str, Any]]
"""Function name to the JSON schema of its arguments."""


class XmlCallReader:
    """Reads the text of one block, from behind its start tag.

    Args:
        index: calls before it in the answer.
        schemas: of the tools; a parameter that none describes is a string.
    """

    def __init__(self, index: int, schemas: Schemas) -> None:
        self.called = False
        """Whether a call was found."""
        self.rest: str | None = None
        """Text behind the end tag; None while the block is open."""
        self.raw = ""
        """The text of the block so far: what it is where it is no call."""
        self._index = index
        self._schemas = schemas
        self._schema: Mapping[str, Any] = {}
        self._parameters: dict[str, Any] = {}
        self._buffer = ""
        self._num_parameters = 0
        self._value = ""  # of the open parameter, where it is not passed on piece by piece
        self._types: frozenset[str] = frozenset()
        self._name = ""
        self._state: Callable[[], Iterator[str | Call]] = self._head

    def push(self, text: str) -> Iterator[Piece]:
        """Take more text; gives the pieces that became certain."""
        self._buffer += text
        if not self.called:
            self.raw += text
        state = None
        while state != self._state and self.rest is None:
            state = self._state
            for piece in state():
                if isinstance(piece, Call):
                    yield piece
                elif piece:
                    yield Arguments(self._index, piece)

    def flush(self) -> Iterator[Piece]:
        """The text has ended; gives what was held back."""
        if self._state == self._in_value and self._is_text and self._buffer:
            yield Arguments(self._index, json.dumps(self._buffer, ensure_ascii=False)[1:-1])

    def _head(self) -> Iterator[str | Call]:
        if head := _FUNCTION.match(self._buffer):
            self.called = True
            name = head[1].strip()
            self._schema = self._schemas.get(name, {})
            self._parameters = parameters_of(self._schema)
            self._buffer = self._buffer[head.end() :]
            self._state = self._between
            yield Call(self._index, new_call_id(), name, "")
            yield "{"
        elif END in self._buffer:
            self.raw, _, self.rest = self.raw.partition(END)

    def _between(self) -> Iterator[str | Call]:
        """Before a parameter or the end of the function; what else stands there means nothing."""
        while True:
            start = self._buffer.find("<")
            self._buffer = self._buffer[start:] if start >= 0 else ""
            if not self._buffer or self._is_tag() or self._may_go_on():
                break
            self._buffer = self._buffer[1:]
        if parameter := _PARAMETER.match(self._buffer):
            self._buffer = self._buffer[parameter.end() :]
            self._state = self._before_value
            yield self._open(parameter[1].strip())
        elif self._buffer.startswith((_END_FUNCTION, END)):
            self._state = self._tail
            yield "}"

    def _is_tag(self) -> bool:
        return self._buffer.startswith((_END_FUNCTION, END)) or _PARAMETER.match(self._buffer) is not None

    def _may_go_on(self) -> bool:
        """Whether more text could make the buffer a tag that counts here."""
        text = self._buffer
        return any(tag.startswith(text) for tag in _FOLLOWING) or (
            text.startswith(_FOLLOWING[0]) and ">" not in text and "\n" not in text and len(text) < 300
        )

    def _open(self, name: str) -> str:
        self._name, self._value = name, ""
        schema = self._parameters.get(name)
        self._types = frozenset({"string"}) if schema is None else types_of(schema, self._schema)
        separator = ", " if self._num_parameters else ""
        self._num_parameters += 1
        return f"{separator}{json.dumps(name, ensure_ascii=False)}: " + ('"' if self._is_text else "")

    @property
    def _is_text(self) -> bool:
        """Whether the open parameter is a string and nothing else."""
        return self._types == {"string"}

    def _before_value(self) -> Iterator[str | Call]:
        """One line break belongs to the tag."""
        if self._buffer:
            self._buffer = self._buffer.removeprefix("\n")
            self._state = self._in_value
        yield from ()

    def _in_value(self) -> Iterator[str | Call]:
        end = _END_VALUE.search(self._buffer)
        certain = end.start() if end else _certain(self._buffer)
        text, self._buffer = self._buffer[:certain], self._buffer[end.end() if end else certain :]
        if self._is_text:
            yield json.dumps(text, ensure_ascii=False)[1:-1]
        else:
            self._value += text
        if end:
            self._state = self._between
            schema = self._parameters.get(self._name, {})
            yield '"' if self._is_text else _json_of(self._value, schema, self._types)

    def _tail(self) -> Iterator[str | Call]:
        _, found, rest = self._buffer.partition(END)
        if found:
            self.rest = rest
        yield from ()


def _certain(text: str) -> int:
    """How much of a value cannot belong to what ends it."""
    start = text.rfind(_END_PARAMETER)
    if start >= 0:
        following = text[start + len(_END_PARAMETER) :].lstrip()
        if any(tag.startswith(following) for tag in _FOLLOWING):
            return start - (text[:start].endswith("\n"))
    tag = f"\n{_END_PARAMETER}"
    for beginning in (tag, _END_PARAMETER):
        for length in range(min(len(beginning) - 1, len(text)), 0, -1):
            if text.endswith(beginning[:length]):
                return len(text) - length
    return len(text)


def _json_of(text: str, schema: Mapping[str, Any], types: frozenset[str]) -> str:
    """The JSON text of a parameter's value; a string where the text is nothing else that the schema allows."""
    for value in fixed_values(schema) or ():
        if text == written(value):
            return json.dumps(value, ensure_ascii=False)
    bare = text.strip()
    if bare.lower() in _WORDS and type_of(value := _WORDS[bare.lower()]) in types:
        return json.dumps(value)
    try:
        value = json.loads(bare, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = text
    if not isinstance(value, str) and type_of(value) in types and _is_finite(value):
        return bare
    return json.dumps(text, ensure_ascii=False)


def _refuse(name: str) -> Any:
    raise ValueError(name)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
