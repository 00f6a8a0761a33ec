"""What all wire formats share: strict schemas, and refusals that name the field but never repeat what was sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edge.errors import RequestError
from edge.violations import violation

Unsupported = Mapping[str, tuple[tuple[Any, ...], str]]
"""Field -> values that ask for nothing (null always does), and the hint for every other value."""
_HINT = "see docs/http-api.md"


class Wire(BaseModel):
    """Part of a request; fields that it does not know are left out."""

    # Strict: a temperature of "0.7" is a client's mistake that should show, not work by luck.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


_Request = TypeVar("_Request", bound=Wire)


def validate(schema: type[_Request], body: Mapping[str, Any]) -> _Request:
    """Check a request's body.

    Raises:
        RequestError: a field is missing, of the wrong type or out of range; ``param`` names it.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise _explain(error, body, _field_names(schema)) from None


def refuse_unsupported(body: Mapping[str, Any], fields: Unsupported) -> None:
    """Refuse what would change the answer but is not supported: nothing that was asked for is silently left out.

    Raises:
        RequestError: a field has a value that asks for something.
    """
    for name, (harmless, hint) in fields.items():
        value = body.get(name)
        # `type(...)`: 1 == True in Python, but not in JSON.
        if value is not None and not any(value == ok and type(value) is type(ok) for ok in harmless):
            raise RequestError(f"this value of {name} is not supported", hint=hint, param=name)


def _explain(error: ValidationError, body: Mapping[str, Any], fields: frozenset[str]) -> RequestError:
    """One violation, in words that never repeat what was sent."""
    # The deepest one: where a field takes several forms, it tells what is wrong with the form that was sent.
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    told = max(errors, key=lambda violation: len(violation["loc"]))
    param = _path(told["loc"], body, fields)
    return RequestError(f"{param}: {violation(told['msg'])}", hint=_HINT, param=param)


def _path(location: Sequence[int | str], body: Any, fields: frozenset[str]) -> str:
    """A pydantic location as ``messages[0].content``, without the names of union members in it."""
    path, node = "", body
    for step in location:
        if isinstance(step, int) and isinstance(node, list) and step < len(node):
            path, node = f"{path}[{step}]", node[step]
        elif isinstance(step, str) and isinstance(node, dict) and (step in node or step in fields):
            path, node = f"{path}.{step}" if path else step, node.get(step)
    return path


@cache
def _field_names(schema: type[Wire]) -> frozenset[str]:
    """Every field of the request and of its parts, as they are called on the wire."""
    document = schema.model_json_schema()
    parts = [document, *document.get("$defs", {}).values()]
    return frozenset(name for part in parts for name in part.get("properties", {}))
