"""The grammars a request may ask for, and their form for llguidance.

A grammar comes from outside and must not cost more than a prompt. llguidance has limits of its own; what they do not
catch is refused here, by the size of its parts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from edge.engine.tool_grammar import literal, tool_grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SOURCE_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64
"""Levels of nested arrays and objects in the text of a schema."""
MAX_CHOICES = 1000
"""Entries of a choice list or of an ``enum``."""
MAX_PROPERTIES = 500
"""Properties of one object: the time to compile grows with their square."""
MAX_LINES = 500
"""Of a Lark grammar: llguidance follows a chain of rules by recursion, and some 2,500 end the process."""
MIN_INTEGER = -(2**62)
"""In a schema: llguidance takes integers at the lower end of 64 bits apart without end, which ends the process."""
MAX_DIVISOR = 1000
"""Product of the terms of all ``multipleOf`` as fractions: they become an automaton with about as many states."""
_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as models write it in one line. Free white space would let a small model indent without end, and leaves nothing
for the grammar to force."""


Kind = Literal["json_schema", "regex", "lark", "choice", "tool_calls"]


@dataclass(frozen=True)
class Grammar:
    """The form an answer must have."""

    kind: Kind
    source: str
    """By kind: a JSON schema; a regular expression; a Lark grammar; a JSON array of strings, one of them the answer; a
    JSON object of the arguments ``form``, ``how_many`` and ``functions`` of
    :func:`~edge.engine.tool_grammar.tool_grammar`."""
    param: str = field(default="response_format", compare=False)
    """The field of the request it came from, for errors."""
    leaves_text: bool = False
    """Whether free text may stand beside what it prescribes, thoughts included."""


def llguidance_source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form.

    Raises:
        ValueError: it is malformed or beyond a limit.
    """
    from llguidance import LLMatcher  # noqa: PLC0415 - a service without grammars does without

    match grammar.kind:
        case "json_schema":
            _check_schema(schema := json.loads(grammar.source))
            return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_STYLE)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "lark":
            if "%json" in grammar.source:
                raise ValueError("%json is not supported: send the schema alone")
            if len(grammar.source.splitlines()) > MAX_LINES:
                raise ValueError(f"it has more than {MAX_LINES} lines")
            return LLMatcher.grammar_from_lark(grammar.source)
        case "choice":
            return LLMatcher.grammar_from_lark(_choice(json.loads(grammar.source)))
        case "tool_calls":
            return LLMatcher.grammar_from_lark(_tool_calls(**json.loads(grammar.source)))


def _choice(choices: Sequence[str]) -> str:
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"it has more than {MAX_CHOICES} choices")
    return "start: " + " | ".join(map(literal, choices))


def _tool_calls(functions: dict[str, Any], **options: Any) -> str:
    for schema in functions.values():
        _check_schema(schema)
    return tool_grammar(functions=functions, style=_STYLE, **options)


def _check_schema(schema: Any) -> None:
    """Refuse what llguidance's own limits do not catch.

    Raises:
        ValueError: a bound is exceeded.
    """
    divisor = 1
    for node in _nodes(schema):
        if _size(node.get("properties")) > MAX_PROPERTIES:
            raise ValueError(f"an object has more than {MAX_PROPERTIES} properties")
        if any(_size(node.get(key)) > MAX_PROPERTIES for key in ("$defs", "definitions")):
            raise ValueError(f"a schema has more than {MAX_PROPERTIES} definitions")
        if _size(node.get("enum")) > MAX_CHOICES:
            raise ValueError(f"an enum has more than {MAX_CHOICES} values")
        divisor *= _divisor(node.get("multipleOf"))
        if divisor > MAX_DIVISOR:
            raise ValueError(f"multipleOf is larger than {MAX_DIVISOR}")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, dict | list) else 0


def _divisor(multiple_of: Any) -> int:
    """Numerator times denominator of ``multipleOf``: 7 for 7, 10 for 2.5 = 5/2; 1 for what is no number."""
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int | float) or multiple_of <= 0:
        return 1
    ratio = Fraction(str(multiple_of))
    return max(ratio.numerator, 1) * ratio.denominator


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema, level by level.

    Raises:
        ValueError: it is nested too deeply, holds a number that is too small, or is no schema at all.
    """
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")  # noqa: TRY004 - callers take it as one kind of refusal
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        if any(type(value) is int and value < MIN_INTEGER for node in level for value in _values(node)):
            raise ValueError(f"a number is below {MIN_INTEGER}")
        yield from (node for node in level if isinstance(node, dict))
        level = [child for node in level for child in _inner(node)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_SCHEMA_DEPTH} levels")


def _inner(node: Any) -> list[Any]:
    return [child for child in _values(node) if isinstance(child, dict | list)]


def _values(node: dict[str, Any] | list[Any]) -> Collection[Any]:
    return node.values() if isinstance(node, dict) else node
