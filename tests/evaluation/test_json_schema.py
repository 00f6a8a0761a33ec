"""JSON schemas: what they accept, and that they cannot do harm."""

from __future__ import annotations

import time
from typing import Any

import pytest

from edge.evaluation.json_schema import MismatchError, check, check_schema

RECURSIVE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "n": {"type": "integer"}}}},
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [1, 1.0, -3], [1.5, True, "1", None]),
        ({"type": ["string", "null"]}, ["", None], [0]),
        ({"type": "number"}, [1, 1.5], [False]),
        ({"enum": ["a", 1, None]}, ["a", 1.0, None], [True, "b"]),
        ({"const": {"a": [1, 2]}}, [{"a": [1, 2.0]}], [{"a": [2, 1]}, {"a": [1, 2], "b": 0}]),
        ({"minimum": 1, "exclusiveMaximum": 2}, [1, 1.9, "text"], [0.9, 2]),
        ({"minLength": 2, "maxLength": 3, "pattern": "^a"}, ["ab", "abc", 7], ["a", "abcd", "bc"]),
        ({"items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3], ["1"]]),
        ({"properties": {"a": {"type": "string"}}, "required": ["a"]}, [{"a": "x", "b": 1}, 5], [{}, {"a": 1}]),
        ({"properties": {"a": {}}, "additionalProperties": False}, [{"a": 1}, {}], [{"b": 1}]),
        ({"additionalProperties": {"type": "integer"}}, [{"x": 1}], [{"x": "1"}]),
        ({"anyOf": [{"type": "string"}, {"minimum": 5, "type": "number"}]}, ["x", 6], [4, None]),
        ({"oneOf": [{"minimum": 5}, {"maximum": 6}]}, [7, 1], [5.5]),
        ({"allOf": [{"minimum": 5}, {"maximum": 6}]}, [5.5], [4, 7]),
        ({"not": {"type": "string"}}, [1], ["x"]),
        (RECURSIVE, [{"next": {"next": {"n": 1}}}], [{"next": {"next": {"n": "1"}}}]),
        (True, [1, None], []),
        (False, [], [1]),
    ],
)
def test_values_follow_or_not(schema: Any, good: list[Any], bad: list[Any]) -> None:
    check_schema(schema)
    for value in good:
        check(value, schema)
    for value in bad:
        with pytest.raises(MismatchError):
            check(value, schema)


def test_the_message_says_where() -> None:
    schema = {"properties": {"list": {"items": {"properties": {"n": {"type": "integer"}}}}}}
    with pytest.raises(MismatchError, match=r"\$\.list\[1\]\.n is no integer"):
        check({"list": [{"n": 1}, {"n": "x"}]}, schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"if": {"type": "string"}},
        {"properties": {"a": {"unknown": 1}}},
        {"type": "text"},
        {"type": 5},
        {"pattern": "("},
        {"pattern": "(?=a)"},
        {"$ref": "https://example.org/schema"},
        {"required": "a"},
        {"minLength": -1},
        {"anyOf": []},
        {"properties": []},
        {"$defs": {"x": 5}},
        "object",
    ],
)
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match=r"\$|pattern|keyword|schema"):
        check_schema(schema)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"$ref": "#"}, 1),
        ({"$ref": "#/$defs/missing"}, 1),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}, 1),
        ({"type": "string", "pattern": "(a+)+$"}, "a" * 100_000 + "b"),
    ],
)
def test_hostile_schemas_end_soon(schema: Any, value: Any) -> None:
    check_schema(schema)
    began = time.process_time()
    with pytest.raises(MismatchError):
        check(value, schema)
    assert time.process_time() - began < 1


def test_names_of_a_schema_are_only_names() -> None:
    name = '"]; import os; os._exit(9) #'
    schema = {"properties": {name: {"const": "'); raise SystemExit('"}}, "required": [name]}
    check_schema(schema)
    with pytest.raises(MismatchError):
        check({name: 1}, schema)
