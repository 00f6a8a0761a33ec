"""JSON against a JSON schema: the keywords that say what an answer looks like, and an error for every other one.

A schema is interpreted, never turned into code, and so may come from anybody. Against
https://json-schema.org/draft/2020-12/json-schema-validation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edge.evaluation import regexes

MAX_STEPS = 20_000
"""Of one check: options within options could take for ever."""
MAX_DEPTH = 64
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_NOTES = frozenset({"$schema", "$id", "$defs", "$comment", "title", "description", "default", "examples"})
_SHOWN = 60
"""Characters of a value in a message."""


class MismatchError(Exception):
    """A value does not follow its schema; the message says where and why."""


def check_schema(schema: Any, path: str = "$") -> None:
    """Make sure that a schema is one, of keywords that are known.

    Raises:
        ValueError: it is not, and where.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"{path} is no JSON schema")  # noqa: TRY004 - a fault of the suite, like the others
    for name, value in schema.items():
        if name in _NOTES:
            continue
        if name not in _SHAPES:
            raise ValueError(f"{path}: the keyword {name!r} of JSON schema is not supported")
        try:
            _SHAPES[name](value, f"{path}.{name}")
        except (TypeError, AttributeError):
            raise ValueError(f"{path}.{name} has a value that it cannot have") from None
    for name, inner in _named(schema.get("$defs", {})):
        check_schema(inner, f"{path}.$defs.{name}")


def check(value: Any, schema: Any) -> None:
    """Check a value against a schema that :func:`check_schema` has seen.

    Raises:
        MismatchError: it does not follow it.
    """
    _Check(schema).value(value, schema, "$")


def _named(value: Any) -> list[tuple[str, Any]]:
    return list(value.items())


@dataclass
class _Check:
    """One check: the schema's root, for references, and the steps that are left."""

    root: Any
    steps: int = field(default=MAX_STEPS)
    depth: int = 0

    def value(self, value: Any, schema: Any, path: str) -> None:
        self.steps -= 1
        self.depth += 1
        if self.steps < 0 or self.depth > MAX_DEPTH:
            raise MismatchError(f"{path}: the schema is too complex to check")
        if schema is False:
            raise MismatchError(f"{path} must not be there")
        for name, limit in [] if schema is True else schema.items():
            if name in _CHECKS:
                _CHECKS[name](self, value, limit, schema, path)
        self.depth -= 1

    def follows(self, value: Any, schema: Any, path: str) -> bool:
        depth = self.depth
        try:
            self.value(value, schema, path)
        except MismatchError:
            if self.steps < 0:
                raise
            self.depth = depth
            return False
        return True

    def definition(self, reference: str) -> Any:
        return self.root if reference == "#" else self.root["$defs"][reference.removeprefix("#/$defs/")]


def _is(value: Any, name: str) -> bool:
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    # JSON's true is no number; Python's is.
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _fail(path: str, reason: str) -> None:
    raise MismatchError(f"{path} {reason}")


def _type(_: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    names = [limit] if isinstance(limit, str) else limit
    if not any(_is(value, name) for name in names):
        _fail(path, f"is no {' or '.join(names)}")


def _enum(_: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    if not any(same(value, option) for option in limit):
        _fail(path, f"is {_show(value)}, not one of {_show(limit)}")


def _const(_: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    if not same(value, limit):
        _fail(path, f"is {_show(value)}, not {_show(limit)}")


def _bound(measure: Callable[[Any], Any], holds: Callable[[Any, Any], bool], reason: str) -> Callable[..., None]:
    """A check of a number or a length; values of other types have none (``measure`` gives None)."""

    def check_bound(_: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
        size = measure(value)
        if size is not None and not holds(size, limit):
            _fail(path, f"is {size}, {reason} {limit}")

    return check_bound


def _number(value: Any) -> Any:
    return value if _is(value, "number") else None


def _length_of(kind: type[str | list[Any]]) -> Callable[[Any], int | None]:
    return lambda value: len(value) if isinstance(value, kind) else None


def _pattern(_: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    if isinstance(value, str) and not regexes.is_match(limit, value):
        _fail(path, f"is {_show(value)}, which does not match {_show(limit)}")


def _properties(run: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    for name, inner in limit.items():
        if isinstance(value, dict) and name in value:
            run.value(value[name], inner, f"{path}.{name}")


def _required(_: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    missing = [name for name in limit if isinstance(value, dict) and name not in value]
    if missing:
        _fail(path, f"lacks {', '.join(map(repr, missing))}")


def _additional(run: _Check, value: Any, limit: Any, schema: Any, path: str) -> None:
    known = schema.get("properties", {})
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name not in known:
            run.value(inner, limit, f"{path}.{_show(name)}")


def _items(run: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    for number, item in enumerate(value if isinstance(value, list) else ()):
        run.value(item, limit, f"{path}[{number}]")


def _all_of(run: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    for option in limit:
        run.value(value, option, path)


def _any_of(run: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    if not any(run.follows(value, option, path) for option in limit):
        _fail(path, "follows none of the options")


def _one_of(run: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    if sum(run.follows(value, option, path) for option in limit) != 1:
        _fail(path, "follows none of the options, or several")


def _not(run: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    if run.follows(value, limit, path):
        _fail(path, "follows what it must not")


def _reference(run: _Check, value: Any, limit: Any, _schema: Any, path: str) -> None:
    try:
        run.value(value, run.definition(limit), path)
    except KeyError:
        _fail(path, f"refers to {limit!r}, which is not there")


_CHECKS: Mapping[str, Callable[..., None]] = {
    "type": _type,
    "enum": _enum,
    "const": _const,
    "minimum": _bound(_number, lambda size, limit: size >= limit, "less than"),
    "maximum": _bound(_number, lambda size, limit: size <= limit, "more than"),
    "exclusiveMinimum": _bound(_number, lambda size, limit: size > limit, "not more than"),
    "exclusiveMaximum": _bound(_number, lambda size, limit: size < limit, "not less than"),
    "minLength": _bound(_length_of(str), lambda size, limit: size >= limit, "shorter than"),
    "maxLength": _bound(_length_of(str), lambda size, limit: size <= limit, "longer than"),
    "minItems": _bound(_length_of(list), lambda size, limit: size >= limit, "shorter than"),
    "maxItems": _bound(_length_of(list), lambda size, limit: size <= limit, "longer than"),
    "pattern": _pattern,
    "properties": _properties,
    "required": _required,
    "additionalProperties": _additional,
    "items": _items,
    "allOf": _all_of,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "not": _not,
    "$ref": _reference,
}


# --- what a schema's own values must be ----------------------------------------------------------------------------


def _demand(holds: bool, path: str) -> None:
    if not holds:
        raise ValueError(f"{path} has a value that it cannot have")


def _shape_type(value: Any, path: str) -> None:
    names = [value] if isinstance(value, str) else value
    _demand(bool(names) and all(name in _TYPES for name in names), path)


def _shape_number(value: Any, path: str) -> None:
    _demand(_is(value, "number"), path)


def _shape_length(value: Any, path: str) -> None:
    _demand(_is(value, "integer") and value >= 0, path)


def _shape_strings(value: Any, path: str) -> None:
    _demand(isinstance(value, list) and all(isinstance(name, str) for name in value), path)


def _shape_pattern(value: Any, path: str) -> None:
    _demand(isinstance(value, str), path)
    regexes.check(value)


def _shape_map(value: Any, path: str) -> None:
    for name, inner in _named(value):
        check_schema(inner, f"{path}.{name}")


def _shape_options(value: Any, path: str) -> None:
    _demand(isinstance(value, list) and bool(value), path)
    for number, inner in enumerate(value):
        check_schema(inner, f"{path}[{number}]")


def _shape_reference(value: Any, path: str) -> None:
    _demand(isinstance(value, str) and (value == "#" or value.startswith("#/$defs/")), path)


_SHAPES: Mapping[str, Callable[[Any, str], None]] = {
    "type": _shape_type,
    "enum": lambda value, path: _demand(isinstance(value, list) and bool(value), path),
    "const": lambda _value, _path: None,
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _shape_number),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _shape_length),
    "pattern": _shape_pattern,
    "properties": _shape_map,
    "required": _shape_strings,
    "additionalProperties": check_schema,
    "items": check_schema,
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), _shape_options),
    "not": check_schema,
    "$ref": _shape_reference,
}
assert _SHAPES.keys() == _CHECKS.keys()
