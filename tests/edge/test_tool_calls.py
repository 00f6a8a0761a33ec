"""Tool calls in the XML form of Qwen3-Coder and Qwen3.5, in whatever pieces their text arrives."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest

from edge.openai.blocks import BlockParser
from edge.openai.pieces import Call, Content, Piece, complete_calls
from edge.openai.xml_calls import XmlCallReader

SCHEMAS = {
    "f": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "ratio": {"type": "number"},
            "on": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "deep": {"$ref": "#/$defs/deep"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "either": {"type": ["string", "integer"]},
            "level": {"enum": ["1", "high"]},
            "mixed": {"enum": [1, "1.0", None]},
            "anything": {},
        },
        "$defs": {"deep": {"type": "object"}},
    }
}
SEED = 20261122


def parse(text: str, cuts: Iterable[int] = ()) -> list[Piece]:
    parser = BlockParser(reasoning=False, tools=True, calls=partial(XmlCallReader, schemas=SCHEMAS))
    pieces: list[Piece] = []
    start = 0
    for end in (*cuts, len(text)):
        pieces += parser.push(text[start:end])
        start = end
    return pieces + parser.flush()


def block(**parameters: str) -> str:
    inner = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in parameters.items())
    return f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"


def arguments(text: str) -> Any:
    (call,) = complete_calls(parse(text))
    return json.loads(call.arguments)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("text", "Köln", "Köln"),
        ("text", "", ""),
        ("text", " two\n\nlines ", " two\n\nlines "),
        ("text", "7", "7"),
        ("text", "true", "true"),
        ("text", '"quoted"', '"quoted"'),
        ("text", 'a "b" \\ \t', 'a "b" \\ \t'),
        ("text", "</tool_call>", "</tool_call>"),
        ("text", "a</parameter>b", "a</parameter>b"),
        ("text", "a\n</parameter>\nb", "a\n</parameter>\nb"),
        ("text", "</para", "</para"),
        ("text", "<parameter=x>", "<parameter=x>"),
        ("count", "7", 7),
        ("count", " -7 ", -7),
        ("count", "seven", "seven"),
        ("ratio", "7.5e2", 750.0),
        ("ratio", "NaN", "NaN"),
        ("ratio", "1e999", "1e999"),
        ("on", "true", True),
        ("on", "False", False),
        ("on", "yes", "yes"),
        ("tags", '["a", "</parameter>"]', ["a", "</parameter>"]),
        ("tags", "a, b", "a, b"),
        ("deep", '{"a": {"b": [1]}}', {"a": {"b": [1]}}),
        ("deep", "[1]", "[1]"),
        ("maybe", "null", None),
        ("maybe", "None", None),
        ("maybe", "nullable", "nullable"),
        ("either", "12", 12),
        ("either", "12 o'clock", "12 o'clock"),
        ("level", "1", "1"),
        ("mixed", "1", 1),
        ("mixed", "1.0", "1.0"),
        ("mixed", "null", None),
        ("anything", "[1]", [1]),
        ("anything", "text", "text"),
        ("undeclared", "7", "7"),
    ],
)
def test_the_schema_tells_what_a_value_is(name: str, text: str, value: Any) -> None:
    assert arguments(block(**{name: text})) == {name: value}


def test_a_call_has_all_of_its_parameters() -> None:
    assert arguments(block(text="a", count="3", on="true", level="high")) == {
        "text": "a",
        "count": 3,
        "on": True,
        "level": "high",
    }
    assert arguments(block()) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call><function=f><parameter=count>3</parameter></function></tool_call>", {"count": 3}),
        ("<tool_call>\n<function=f>\n<parameter=count>\n3\n</parameter>\n</tool_call>", {"count": 3}),
        ("<tool_call>\n<function=f>\n<parameter=text>\na\n</parameter>\n</function>", {"text": "a"}),
        (
            "<tool_call>\n<function=f>\n junk <x> <parameter=count>\n3\n</parameter>\n</function></tool_call>",
            {"count": 3},
        ),
        ("<tool_call>\n<function=g>\n<parameter=count>\n3\n</parameter>\n</function></tool_call>", {"count": "3"}),
    ],
)
def test_careless_calls_are_understood(text: str, expected: Any) -> None:
    assert arguments(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<tool_call>text</tool_call> more",
        '<tool_call>{"name": "f"}</tool_call>',
        "<tool_call>\n<function=f",
        "<function=f>\n</function>",
        "a <tool_call",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert "".join(piece.text for piece in parse(text) if isinstance(piece, Content)) == text


def test_a_call_that_is_cut_off_keeps_what_is_there() -> None:
    (call,) = complete_calls(parse("<tool_call>\n<function=f>\n<parameter=text>\nhalf a sen"))
    assert (call.name, call.arguments) == ("f", '{"text": "half a sen')


def test_text_before_between_and_after_calls() -> None:
    pieces = parse(f"First.\n\n{block(count='1')}\n{block(count='2')}\nDone.")
    text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    assert text == "First.\nDone."
    calls = complete_calls(pieces)
    assert [(call.index, json.loads(call.arguments)) for call in calls] == [(0, {"count": 1}), (1, {"count": 2})]
    assert len({call.id for call in calls}) == 2


def test_strings_are_passed_on_as_they_come() -> None:
    parser = BlockParser(reasoning=False, tools=True, calls=partial(XmlCallReader, schemas=SCHEMAS))
    (call, *_) = parser.push("<tool_call>\n<function=f>\n")
    assert isinstance(call, Call)
    assert (call.name, call.arguments) == ("f", "")
    parser.push("<parameter=text>\n")
    assert [piece.text for piece in parser.push("The quick")] == ["The quick"]  # type: ignore[union-attr]


def test_calls_do_not_depend_on_how_the_text_is_cut() -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    texts = [
        "Hm.\n" + block(text='a</parameter> <b> "c"', count="3") + "\n" + block(tags='["x"]', maybe="null"),
        "<tool_call>\n<function=f>\n<x<parameter=text>\n\n</parameter>\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=text>\n</parameter></parameter",
        "<tool_call><<<<</tool_call>",
    ]
    for text in texts:
        whole = _facts(parse(text))
        for _ in range(200):
            cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, len(text))))
            assert _facts(parse(text, cuts)) == whole


def test_endless_junk_is_read_once() -> None:
    assert complete_calls(parse("<tool_call>\n<function=f>\n" + "<" * 100_000))[0].name == "f"


def _facts(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    return text, [(call.name, call.arguments) for call in complete_calls(pieces)]
