"""What a parameter of a tool may be, by its JSON schema: its text in an XML call is read, and constrained, by that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

ANY = frozenset({"string", "number", "boolean", "null", "object", "array"})
"""All types; integers count as numbers."""
_MAX_REFERENCES = 8
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})


def resolve(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """A schema, or what its ``$ref`` into ``root`` stands for; an empty one where that leads nowhere."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, dict):
            return {}
        if not isinstance(reference := schema.get("$ref"), str):
            return schema
        schema = _follow(reference, root)
    return {}


def parameters_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas of a function's parameters by name, references resolved.

    Args:
        function: the schema of its arguments.
    """
    properties = resolve(function, function).get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: resolve(schema, function) for name, schema in properties.items()}


def fixed_values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values of ``enum`` or ``const``, or None where the schema has neither."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def types_of(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = _MAX_REFERENCES) -> frozenset[str]:
    """The types that a schema allows, as far as it says so by ``type``, ``enum``, ``const`` or a union.

    Args:
        schema: of a value, itself no reference.
        root: what references in it lead into.
        depth: levels of unions that are looked into; a schema may refer to itself.
    """
    if (values := fixed_values(schema)) is not None:
        return frozenset(map(type_of, values))
    if (named := schema.get("type")) is not None:
        names = named if isinstance(named, list) else [named]
        return frozenset("number" if name == "integer" else name for name in names if isinstance(name, str))
    members = list(union_members(schema))
    if members and depth:
        return frozenset[str]().union(*(types_of(resolve(member, root), root, depth - 1) for member in members))
    return ANY


def union_members(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas of ``anyOf`` or ``oneOf``."""
    for key in ("anyOf", "oneOf"):
        if isinstance(members := schema.get(key), list):
            yield from members


def is_bare(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = _MAX_REFERENCES) -> bool:
    """Whether a schema names types and restricts them no further; arguments as for :func:`types_of`."""
    if depth == 0 or schema.keys() - _ANNOTATIONS - {"type", "anyOf", "oneOf"}:
        return False
    return all(is_bare(resolve(member, root), root, depth - 1) for member in union_members(schema))


def type_of(value: Any) -> str:
    """The type of a JSON value."""
    if isinstance(value, bool):  # before numbers: it is an int in Python
        return "boolean"
    if value is None:
        return "null"
    names: dict[type, str] = {str: "string", int: "number", float: "number", dict: "object", list: "array"}
    return names[type(value)]


def written(value: Any) -> str:
    """A value as templates write it into an XML call: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _follow(reference: str, root: Mapping[str, Any]) -> Any:
    node: Any = root
    if not reference.startswith("#"):
        return None
    for step in reference.removeprefix("#").strip("/").split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if name:
            node = node.get(name) if isinstance(node, dict) else None
    return node
