"""The JSON schemas in docs/schemas: one for each message, and they say what the classes say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from edge.mqtt.messages import Message
from tests.edge.mqtt.client import SCHEMAS, schema_of
from tests.edge.mqtt.test_messages import SAMPLES, SPECIFICATION
from tests.json_schema import SchemaError, validate

WRONG = [None, True, -1, 1.5, "x", [], {}, 10**9]


def test_there_is_one_for_each_message_and_no_other() -> None:
    files = {path.name for path in SCHEMAS.iterdir()}
    assert files == {schema_of(cls).name for cls in Message.__subclasses__()}


def test_they_are_in_step_with_the_classes() -> None:
    root = SCHEMAS.parents[2]
    done = subprocess.run(
        [sys.executable, "-c", GENERATE], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    generated = json.loads(done.stdout)
    assert {name: (root / "docs" / name).read_text(encoding="utf-8") for name in generated} == generated


GENERATE = """
import json, sys
sys.path.insert(0, ".ci")
import generate_docs
print(json.dumps(generate_docs.schema_files()))
"""


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_schema_and_class_refuse_the_same_mutations(sample: Message) -> None:
    schema = json.loads(schema_of(type(sample)).read_text(encoding="utf-8"))
    value = json.loads(sample.encode())
    validate(value, schema)
    for mutated in _mutations(value):
        assert _follows(schema, mutated) == _reads(type(sample), mutated), mutated


def test_they_say_what_a_message_is_and_what_its_fields_mean() -> None:
    for cls in Message.__subclasses__():
        schema = json.loads(schema_of(cls).read_text(encoding="utf-8"))
        assert schema["description"].startswith(("Client to device", "Device to client", "Retained", "On a rule's"))
        assert schema["properties"]["v"]["description"] == "Protocol version: 1."
    assert "(schemas/mqtt)" in SPECIFICATION.read_text(encoding="utf-8")


def _mutations(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Every field left out, and replaced by values of all types; and a field that nobody knows."""
    without = [{key: each for key, each in value.items() if key != name} for name in value]
    replaced = [{**value, name: wrong} for name in value for wrong in WRONG]
    return [*without, *replaced, {**value, "surprise": 1}]


def _follows(schema: dict[str, Any], value: Any) -> bool:
    try:
        validate(value, schema)
    except SchemaError:
        return False
    return True


def _reads(cls: type[Message], value: Any) -> bool:
    try:
        cls.model_validate_json(json.dumps(value))
    except ValidationError:
        return False
    return True
