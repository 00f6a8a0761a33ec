"""``{{name}}`` in prompts and expected values: replaced once, by what a test's variables say.

Nothing is executed and what was put in is not looked at again, so a variable may hold any text. A value that is nothing
but ``{{name}}`` becomes the variable itself, a number remaining a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_SYNTAX = ("{{", "{%", "{#")


def fill(value: Any, variables: Mapping[str, Any]) -> Any:
    """Replace names in all strings of a value.

    Raises:
        ValueError: there is no such variable, or the text asks for more than names.
    """
    if isinstance(value, str):
        return _fill_text(value, variables)
    if isinstance(value, list):
        return [fill(item, variables) for item in value]
    if isinstance(value, dict):
        return {key: fill(item, variables) for key, item in value.items()}
    return value


def _fill_text(text: str, variables: Mapping[str, Any]) -> Any:
    pieces = _NAME.split(text)
    for literal in pieces[::2]:
        for mark in _SYNTAX:
            if mark in literal:
                raise ValueError(f"only {{{{name}}}} is replaced, but there is another {mark!r}")
    names = pieces[1::2]
    for name in names:
        if name not in variables:
            raise ValueError(f"there is no variable {name!r}")
    if len(names) == 1 and pieces[0] == pieces[2] == "":
        return variables[names[0]]
    pieces[1::2] = [as_text(variables[name]) for name in names]
    return "".join(pieces)


def as_text(value: Any) -> str:
    """A variable within a text: strings as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
