"""Checks JSON values against the schemas in docs/schemas."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import fastjsonschema

SchemaError = fastjsonschema.JsonSchemaException
"""A value does not follow its schema."""


def validate(value: Any, schema: dict[str, Any]) -> None:
    """Check a JSON value.

    Raises:
        SchemaError: it does not follow the schema.
    """
    _compiled(json.dumps(schema))(value)


@cache
def _compiled(schema: str) -> Callable[[Any], Any]:
    check: Callable[[Any], Any] = fastjsonschema.compile(json.loads(schema), use_default=False)
    return check
