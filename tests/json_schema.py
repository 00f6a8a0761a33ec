"""Checks JSON values against the schemas in docs/schemas."""

from __future__ import annotations

from typing import Any

import fastjsonschema

SchemaError = fastjsonschema.JsonSchemaException
"""A value does not follow its schema."""


def validate(value: Any, schema: dict[str, Any]) -> None:
    """Check a JSON value.

    Raises:
        SchemaError: it does not follow the schema.
    """
    fastjsonschema.compile(schema, use_default=False)(value)
