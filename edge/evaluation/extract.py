"""What is looked for in an answer: numbers, JSON, code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

_NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?\d[\d.,'\N{RIGHT SINGLE QUOTATION MARK}]*")
_MAX_NUMBER_CHARS = 40
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_MAX_STARTS = 64
"""Places where JSON may begin that are tried."""


def numbers(text: str) -> list[frozenset[float]]:
    """Every number of a text, in order, each as all that it can mean: ``80.000`` is 80 in English, 80000 in German."""
    return [values for match in _NUMBER.finditer(text) if (values := _meanings(match.group()))]


def _meanings(literal: str) -> frozenset[float]:
    literal = literal.rstrip(".,'\N{RIGHT SINGLE QUOTATION MARK}").replace("\N{MINUS SIGN}", "-")
    if len(literal) > _MAX_NUMBER_CHARS:
        return frozenset()
    literal = literal.replace("'", ",").replace("\N{RIGHT SINGLE QUOTATION MARK}", ",")
    swapped = literal.translate({ord("."): ",", ord(","): "."})
    return frozenset(float(text.replace(",", "")) for text in (literal, swapped) if _is_english(text))


def _is_english(literal: str) -> bool:
    return re.fullmatch(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?", literal) is not None


def whole_json(text: str) -> Any:
    """A text that is JSON and nothing else.

    Raises:
        ValueError: it is not.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def some_json(text: str) -> Any:
    """The first JSON object or array of a text, in a block of code or bare.

    Raises:
        ValueError: there is none.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse)
    for start in _starts(text):
        try:
            return decoder.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            continue
    raise ValueError("there is none")


def _starts(text: str) -> Iterator[int]:
    for number, match in enumerate(re.finditer(r"[{\[]", text)):
        if number >= _MAX_STARTS:
            return
        yield match.start()


def code(text: str) -> str:
    """The first block of code of a text, or the whole text where there is none; a block may lack its end."""
    match = _FENCE.search(text)
    return (match.group(2) if match else text).strip("\n")


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
