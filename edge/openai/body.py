"""Bytes to a JSON object, strictly.

``json.loads`` accepts more than JSON: ``NaN``, ``Infinity``, numbers that overflow to infinity, lone surrogates that
no UTF-8 text can carry back. Each of them breaks something further in, so they end here.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from edge.errors import RequestError

MAX_DEPTH = 64
"""Levels of nested arrays and objects."""
_HINT = "send one JSON object in UTF-8"


def parse_body(payload: bytes) -> dict[str, Any]:
    """Read a request's body.

    Raises:
        RequestError: what :func:`parse_json` raises; or it is no object.
    """
    value = parse_json(payload)
    if not isinstance(value, dict):
        raise RequestError("the body is not a JSON object", hint=_HINT)
    return value


def parse_json(payload: bytes) -> Any:
    """Read any JSON value.

    Raises:
        RequestError: it is not UTF-8, not JSON, nested too deeply, or holds a number or a string that JSON cannot
            express (NaN, infinity, a lone surrogate).
    """
    try:
        text = payload.decode("utf-8-sig")  # what PowerShell and editors on Windows write begins with a mark
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise RequestError("the body is not valid UTF-8", hint=_HINT) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"the body is not valid JSON{where}", hint=_HINT) from None
    _check_tree(value, surrogates="\\u" in text)
    return value


def _refuse_constant(_name: str) -> NoReturn:
    raise ValueError("not JSON")


def _finite(literal: str) -> float:
    if not math.isfinite(value := float(literal)):
        raise ValueError("not finite")
    return value


def _check_tree(root: Any, *, surrogates: bool) -> None:
    """Check the depth, level by level; look for lone surrogates only where an escape could have made one."""
    level: list[Any] = [[root]]
    for _ in range(1 + MAX_DEPTH):
        if surrogates:
            _check_strings(level)
        level = [child for node in level for child in _children(node) if isinstance(child, _INNER)]
        if not level:
            return
    raise _too_deep()


_INNER = (dict, list)


def _children(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node


def _check_strings(level: list[Any]) -> None:
    for node in level:
        strings = [text for text in _children(node) if isinstance(text, str)]
        if isinstance(node, dict):
            strings += node
        for text in strings:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise RequestError("the body holds a lone surrogate (\\ud800 to \\udfff)", hint=_HINT) from None


def _too_deep() -> RequestError:
    return RequestError(f"the body is nested deeper than {MAX_DEPTH} levels", hint="send a flatter object")
