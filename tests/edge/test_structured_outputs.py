"""Grammars from the wire to the answer: real scheduler, service and llguidance over the fake engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from edge.errors import RequestError
from edge.openai import parse_chat, prepare
from edge.service import Service
from tests.answers import first_choice
from tests.fakes import FakeEngine, last_user_message, make_service

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "y": {"enum": ["up", "down"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
BY_SCHEMA = {"type": "json_schema", "json_schema": {"name": "point", "strict": True, "schema": POINT}}
TOOLS = [
    {"type": "function", "function": {"name": "move", "parameters": POINT}},
    {"type": "function", "function": {"name": "halt"}},
]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Says what the user said last."""
    service = make_service(FakeEngine(reply=last_user_message, context_length=512))
    service.start()
    yield service
    service.stop()


def chat(said: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": said}], **fields}


def test_what_fits_stays_what_it_is(service: Service) -> None:
    said = '{"x": 3, "y": "down"}'
    choice = first_choice(service, chat(said, response_format=BY_SCHEMA))
    assert (choice["message"]["content"], choice["finish_reason"]) == (said, "stop")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": BY_SCHEMA},
        {"structured_outputs": {"json": POINT}},
        {"guided_json": POINT},
        {"response_format": BY_SCHEMA, "tools": TOOLS, "tool_choice": "none"},
        {"response_format": BY_SCHEMA, "temperature": 1.5, "seed": 3, "presence_penalty": 1.0},
    ],
)
def test_what_does_not_fit_is_brought_into_form(service: Service, fields: dict[str, Any]) -> None:
    choice = first_choice(service, chat("Sure! Here is the JSON you wanted", **fields))
    value = json.loads(choice["message"]["content"])
    assert value.keys() == {"x", "y"}
    assert value["x"] in range(10)
    assert value["y"] in {"up", "down"}


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_any_object(service: Service, fields: dict[str, Any]) -> None:
    said = '{"naïve": [1, {"a": null}], "b": "ü"}'
    assert first_choice(service, chat(said, **fields))["message"]["content"] == said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"structured_outputs": {"regex": "v[0-9]+"}}, "v12"),
        ({"guided_regex": "v[0-9]+"}, "v12"),
        ({"structured_outputs": {"choice": ["ja", "nein"]}}, "nein"),
        ({"guided_choice": ["ja", "nein"]}, "nein"),
        ({"structured_outputs": {"grammar": 'start: "a"+ "b"'}}, "aaab"),
        ({"guided_grammar": 'start: "a"+ "b"'}, "aaab"),
        ({"response_format": {"type": "text"}}, "anything"),
    ],
)
def test_completions_and_chat_take_the_same_fields(service: Service, fields: dict[str, Any], said: str) -> None:
    assert first_choice(service, chat(said, **fields))["message"]["content"] == said
    assert first_choice(service, {"prompt": said, **fields})["text"] == said


def test_an_answer_may_be_cut_off(service: Service) -> None:
    choice = first_choice(service, chat('{"x": 3, "y": "down"}', response_format=BY_SCHEMA, max_tokens=6))
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"x": ', "length")


def test_a_form_leaves_no_thoughts(service: Service) -> None:
    body = chat("<think>", guided_regex="<think>[a-z]{3}")
    assert first_choice(service, body)["message"]["content"].startswith("<think>")
    prompt = prepare(service.model, parse_chat(body))[0].prompt_ids
    assert service.model.tokenizer.decode(prompt).endswith("</think>\n\n")


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "move"}}])
def test_a_forced_call_validates(service: Service, tool_choice: Any) -> None:
    said = '<tool_call>\n{"name": "move", "arguments": {"x": 7, "z": "sideways"}}\n</tool_call>'
    choice = first_choice(service, chat(said, tools=TOOLS, tool_choice=tool_choice, parallel_tool_calls=False))
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "move"
    arguments = json.loads(call["function"]["arguments"])
    assert (arguments["x"], arguments.keys()) == (7, {"x", "y"})


def test_a_forced_call_without_parameters(service: Service) -> None:
    wanted = {"type": "function", "function": {"name": "halt"}}
    (call,) = first_choice(service, chat("no", tools=TOOLS, tool_choice=wanted))["message"]["tool_calls"]
    assert call["function"] == {"name": "halt", "arguments": "{}"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": BY_SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": BY_SCHEMA, "tools": TOOLS}, "response_format"),
        ({"guided_regex": "a", "tools": TOOLS, "tool_choice": "required"}, "tools"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}}, "response_format"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(service: Service, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        prepare(service.model, parse_chat(chat("Hi", **fields)))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.hint
