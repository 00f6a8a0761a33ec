"""A validator for the JSON schemas in docs/: the keywords that they use, and an error for every other one.

Against https://json-schema.org/draft/2020-12/json-schema-validation, for the part that is there.
"""

from __future__ import annotations

from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
NOTES = {"$schema", "$defs", "title", "description", "default", "$ref"}


class SchemaError(AssertionError):
    """A value does not follow its schema."""


def validate(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None, path: str = "$") -> None:
    """Check a JSON value.

    Raises:
        SchemaError: it does not follow the schema.
        NotImplementedError: the schema has a keyword that this validator does not know.
    """
    root = schema if root is None else root
    if unknown := set(schema) - set(KEYWORDS) - NOTES:
        raise NotImplementedError(f"{path}: {unknown}")
    if reference := schema.get("$ref"):
        validate(value, root["$defs"][reference.removeprefix("#/$defs/")], root, path)
    for keyword, check in KEYWORDS.items():
        if keyword in schema:
            check(value, schema, root, path)


def _fail(path: str, reason: str) -> None:
    raise SchemaError(f"{path}: {reason}")


def _type(value: Any, schema: dict[str, Any], _root: dict[str, Any], path: str) -> None:
    # JSON has no integers that are booleans; Python has.
    if not isinstance(value, TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        _fail(path, f"is no {schema['type']}")


def _const(value: Any, schema: dict[str, Any], _root: dict[str, Any], path: str) -> None:
    if value != schema["const"] or isinstance(value, bool) != isinstance(schema["const"], bool):
        _fail(path, f"is not {schema['const']!r}")


def _range(value: Any, schema: dict[str, Any], _root: dict[str, Any], path: str) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < schema.get("minimum", value):
            _fail(path, "is too small")
        if value > schema.get("maximum", value):
            _fail(path, "is too large")


def _properties(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str) -> None:
    for name, inner in schema["properties"].items():
        if isinstance(value, dict) and name in value:
            validate(value[name], inner, root, f"{path}.{name}")


def _required(value: Any, schema: dict[str, Any], _root: dict[str, Any], path: str) -> None:
    if isinstance(value, dict) and (missing := set(schema["required"]) - set(value)):
        _fail(path, f"lacks {missing}")


def _additional(value: Any, schema: dict[str, Any], _root: dict[str, Any], path: str) -> None:
    known = schema.get("properties", {})
    if schema["additionalProperties"] is False and isinstance(value, dict) and (surplus := set(value) - set(known)):
        _fail(path, f"has {surplus}")


def _items(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str) -> None:
    for number, item in enumerate(value if isinstance(value, list) else ()):
        validate(item, schema["items"], root, f"{path}[{number}]")


def _any_of(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str) -> None:
    for option in schema["anyOf"]:
        try:
            return validate(value, option, root, path)
        except SchemaError:
            continue
    return _fail(path, "follows none of the options")


KEYWORDS = {
    "type": _type,
    "const": _const,
    "minimum": _range,
    "maximum": _range,
    "properties": _properties,
    "required": _required,
    "additionalProperties": _additional,
    "items": _items,
    "anyOf": _any_of,
}
