"""Calls in both forms of Qwen's models that cannot but validate: real llguidance over the fake engine."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest

from edge.errors import RequestError
from edge.openai import Answer, parse_chat, prepare
from edge.service import Service, events
from tests.edge.http.malformed import odd_nodes
from tests.fakes import CHAT_TEMPLATE, FakeEngine, make_service

TEMPLATES = Path(__file__).parent.parent / "data" / "chat_templates"
XML_TEMPLATE = (TEMPLATES / "qwen3-coder" / "template.jinja").read_text(encoding="utf-8")
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 2, "maxLength": 8},
        "day": {"enum": ["today", "tomorrow"]},
        "hours": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 23}, "maxItems": 2},
        "code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]$"},
        "metric": {"type": "boolean"},
        "level": {"anyOf": [{"type": "integer", "minimum": 3, "maximum": 12}, {"type": "null"}]},
        "date": {"type": "string", "format": "date"},
        "spot": {"$ref": "#/$defs/spot"},
    },
    "required": ["city", "day", "hours", "code", "spot"],
    "additionalProperties": False,
    "$defs": {
        "spot": {
            "type": "object",
            "properties": {"x": {"type": "number"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "halt"}},
]
SEED = 20261122
validate_place = fastjsonschema.compile(PLACE)


def xml_call(**parameters: str) -> str:
    inner = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in parameters.items())
    return f"<tool_call>\n<function=weather>\n{inner}</function>\n</tool_call>"


def json_call(**arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': arguments})}\n</tool_call>"


GOOD = {"city": "Ulm", "day": "today", "hours": [7], "code": "AB/1", "spot": {"x": 1}}
GOOD_CALLS = {
    "xml": xml_call(city="Ulm", day="today", hours="[7]", code="AB/1", spot='{"x": 1}'),
    "json": json_call(**GOOD),
}


@pytest.fixture(scope="module")
def say() -> Iterator[Any]:
    """Ask a model that would say something: ``say(form, text, **fields)`` gives the choice."""
    said = [""]
    services: dict[str, Service] = {}
    with ExitStack() as stack:
        for form, template in (("xml", XML_TEMPLATE), ("json", CHAT_TEMPLATE)):
            services[form] = make_service(FakeEngine(reply=lambda _: said[0], context_length=16384), template=template)
            services[form].start()
            stack.callback(services[form].stop)

        def ask(form: str, text: str, **fields: Any) -> dict[str, Any]:
            said[0] = text
            body = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "max_tokens": 900, **fields}
            request = parse_chat(body)
            generations = prepare(services[form].model, request)
            answer = Answer(services[form].model, request, generations)

            async def collect() -> None:
                async for index, event in events(services[form], generations):
                    answer.chunks(index, event)

            asyncio.run(collect())
            choice: dict[str, Any] = answer.body()["choices"][0]
            return choice

        yield ask


def arguments_of(choice: dict[str, Any]) -> list[Any]:
    return [json.loads(call["function"]["arguments"]) for call in choice["message"].get("tool_calls", ())]


both_forms = pytest.mark.parametrize("form", ["xml", "json"])


@both_forms
@pytest.mark.parametrize("tool_choice", ["auto", "required", {"type": "function", "function": {"name": "weather"}}])
def test_a_valid_call_stays_what_it_is(say: Any, form: str, tool_choice: Any) -> None:
    choice = say(form, GOOD_CALLS[form], tool_choice=tool_choice)
    assert choice["finish_reason"] == "tool_calls"
    assert arguments_of(choice) == [GOOD]


@pytest.mark.parametrize(
    "parameters",
    [
        {"city": "U", "day": "now", "hours": "[99]", "code": "xx", "spot": "7"},
        {"city": "Ulm"},
        {"day": "today", "city": "Ulm"},
        {**GOOD, "hours": "[1, 2, 3]", "code": "AB/1", "spot": '{"x": 1}', "metric": "maybe"},
        {"wrong": "1", "city": "Ulm\n</parameter>\n<x>", "day": "today", "date": "tomorrow"},
    ],
)
@pytest.mark.parametrize("tool_choice", ["auto", "required"])
def test_an_xml_call_is_brought_into_form(say: Any, parameters: dict[str, Any], tool_choice: str) -> None:
    said = xml_call(**{name: str(value) for name, value in parameters.items()})
    for seed in range(3):
        # Where the model's own words are not allowed, anything that is comes with the same probability.
        choice = say("xml", said, tool_choice=tool_choice, temperature=1.0, seed=seed, max_tokens=3000)
        assert choice["finish_reason"] == "tool_calls"
        calls = choice["message"]["tool_calls"]
        assert "weather" in [call["function"]["name"] for call in calls]
        for call in calls:
            if call["function"]["name"] == "weather":
                validate_place(json.loads(call["function"]["arguments"]))


@both_forms
def test_free_calls_stand_in_text(say: Any, form: str) -> None:
    said = f"Let me see.\n\n{GOOD_CALLS[form]}\n{GOOD_CALLS[form]}\nDone."
    choice = say(form, said)
    assert arguments_of(choice) == [GOOD, GOOD]
    assert choice["message"]["content"] == "Let me see.\nDone."


@both_forms
def test_text_is_free_to_be_anything_else(say: Any, form: str) -> None:
    said = '<tool_ {"name": "weather"} </tool_call> ü <function=weather>'
    choice = say(form, said)
    assert (choice["message"]["content"], choice["finish_reason"]) == (said, "stop")


@both_forms
def test_a_free_call_names_a_tool_that_there_is(say: Any, form: str) -> None:
    said = {"json": '<tool_call>\n{"name": "hack", "arguments": {}}', "xml": "<tool_call>\n<function=hack>\n"}[form]
    choice = say(form, said, max_tokens=60)
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "halt"


@both_forms
def test_one_free_call_at_most(say: Any, form: str) -> None:
    said = f"See:\n{GOOD_CALLS[form]}\n{GOOD_CALLS[form]}"
    choice = say(form, said, parallel_tool_calls=False)
    assert arguments_of(choice) == [GOOD]
    assert choice["message"]["content"] == "See:"
    assert say(form, "None.", parallel_tool_calls=False)["message"]["content"] == "None."


@both_forms
def test_required_calls_are_one_or_more(say: Any, form: str) -> None:
    said = f"{GOOD_CALLS[form]}\n{GOOD_CALLS[form]}"
    assert arguments_of(say(form, said, tool_choice="required")) == [GOOD, GOOD]
    assert arguments_of(say(form, said, tool_choice="required", parallel_tool_calls=False)) == [GOOD]
    named = {"type": "function", "function": {"name": "weather"}}
    assert arguments_of(say(form, said, tool_choice=named)) == [GOOD]


@both_forms
def test_a_call_without_parameters(say: Any, form: str) -> None:
    choice = say(form, "no", tool_choice={"type": "function", "function": {"name": "halt"}})
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "halt", "arguments": "{}"}


@both_forms
def test_stop_strings_do_not_cut_calls(say: Any, form: str) -> None:
    said = f"See:{GOOD_CALLS[form]} and so on."
    for tool_choice in ("auto", "required"):
        text = said if tool_choice == "auto" else GOOD_CALLS[form]
        choice = say(form, text, tool_choice=tool_choice, stop=["Ulm", "and"])
        assert arguments_of(choice) == [GOOD]
    choice = say(form, said, stop=["and"])
    assert choice["message"]["content"].strip() == "See:"


@both_forms
def test_odd_schemas_are_refused_or_used(say: Any, form: str) -> None:
    print(f"seed {SEED}")
    body = {"tools": [TOOLS[0]], "tool_choice": "required", "max_tokens": 8}
    outcomes = Counter[str]()
    for odd in odd_nodes(random.Random(SEED), 60, body):
        for changed in ({}, {"tool_choice": "auto"}):
            try:
                say(form, GOOD_CALLS[form], **{**odd, **changed})
                outcomes["used"] += 1
            except RequestError:
                outcomes["refused"] += 1
    assert min(outcomes["used"], outcomes["refused"]) > 10


@pytest.mark.parametrize("schema", [{"anyOf": [{"$ref": "#"}]}, {"$ref": "#"}, {"$ref": "#/properties/a"}])
def test_a_schema_that_leads_back_to_itself_ends(say: Any, schema: Any) -> None:
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"a": schema}, **schema}}
    tools = [{"type": "function", "function": function}]
    choice = say("xml", xml_call(a="7"), tools=tools, max_tokens=80)
    assert choice["finish_reason"] in {"tool_calls", "length"}


def test_arguments_are_an_object_even_where_a_schema_does_not_say_so(say: Any) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"description": "any"}}}]
    said = '<tool_call>\n{"name": "weather", "arguments": 3}'
    (arguments,) = arguments_of(say("json", said, tools=tools, tool_choice="required", temperature=1.0, seed=1))
    assert isinstance(arguments, dict)


def test_a_model_makes_no_parameters_up(say: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    for form, said in (("json", json_call(a=1, b=2)), ("xml", xml_call(a="1", b="2"))):
        assert arguments_of(say(form, said, tools=tools, tool_choice="required", parallel_tool_calls=False)) == [
            {"a": 1}
        ]


def test_an_open_object_takes_any_parameters(say: Any) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    said = xml_call(a="1", b_2="two\nlines")
    assert arguments_of(say("xml", said, tools=tools, tool_choice="required")) == [{"a": "1", "b_2": "two\nlines"}]


HARD = {
    "json": [{"type": "object", "properties": {"a": {"type": "strin"}}}, {"type": "string"}],
    "xml": [
        {"type": "array"},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "required": ["a"]},
        {"type": "object", "properties": {"a": {"enum": []}}},
        {"type": "object", "properties": {"a": {"type": "string", "format": "hostname"}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "a", "maxLength": 3}}},
        {"type": "object", "properties": {"a": {"type": ["string", "integer"], "minimum": 3}}},
        {"type": "object", "properties": {"a": {}}, "minProperties": 1},
        {"type": "object", "properties": {"a": {"enum": ["1", 1]}}},
        {"type": "object", "properties": {"a<b": {}}},
        {"type": "object", "properties": {"a": {}}, "required": ["b"]},
    ],
}


@pytest.mark.parametrize(("form", "schema"), [(form, schema) for form, schemas in HARD.items() for schema in schemas])
def test_what_cannot_be_held_to_is_refused_where_it_is_insisted_on(say: Any, form: str, schema: Any) -> None:
    function = {"name": "weather", "parameters": schema}
    for fields in (
        {"tool_choice": "required"},
        {"parallel_tool_calls": False},
        {"tools": [{"type": "function", "function": {**function, "strict": True}}]},
    ):
        with pytest.raises(RequestError) as caught:
            say(form, "x", **{"tools": [{"type": "function", "function": function}], **fields})
        assert (caught.value.status, caught.value.param) == (400, "tools")
        assert caught.value.hint
    # Otherwise the call has its form, and the model is free inside of it.
    said = {"xml": xml_call(a="7"), "json": json_call(a="7")}[form]
    choice = say(form, said, tools=[{"type": "function", "function": function}])
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]
