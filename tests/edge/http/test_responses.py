"""OpenAI's responses over a real server: items in, items out, and the events of a stream."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from edge.errors import RequestError
from edge.openai.responses import parse_response, to_chat
from tests.fakes import MODEL_NAME, FakeEngine
from tests.serving import Served

RESPONSES = "/v1/responses"
CALL = '<tool_call>\n{"name": "valve", "arguments": {"open": true}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "name": "valve",
        "parameters": {"type": "object", "properties": {"open": {"type": "boolean"}}, "required": ["open"]},
    }
]
Serve = Callable[..., Served]


def ask(server: Served, **body: Any) -> dict[str, Any]:
    response = server.client.post(RESPONSES, json={"input": "Hi", **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(server: Served, **body: Any) -> list[dict[str, Any]]:
    """The events, whose names and numbers are right."""
    text = server.client.post(RESPONSES, json={"input": "Hi", **body, "stream": True}).text
    events = list(_events(text))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def _events(text: str) -> Iterator[dict[str, Any]]:
    for block in filter(None, text.split("\n\n")):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        yield event


def texts(response: dict[str, Any]) -> list[str]:
    return [part["text"] for item in response["output"] for part in item.get("content", ())]


def test_a_text_is_answered(server: Served) -> None:
    response = ask(server, model=MODEL_NAME, metadata={"a": "b"}, user="u", store=True)
    assert (response["object"], response["status"], response["store"]) == ("response", "completed", False)
    assert (response["model"], response["metadata"], response["error"]) == (MODEL_NAME, {"a": "b"}, None)
    (item,) = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    part = {"type": "output_text", "text": "You said: Hi", "annotations": [], "logprobs": []}
    assert item["content"] == [part]
    assert response["usage"] == {
        "input_tokens": len("1user\nHi2\n1assistant\n"),
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 13,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len("1user\nHi2\n1assistant\n") + 13,
    }
    assert response["timings"]["ttft_ms"] > 0


def test_a_stream_tells_the_same(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: f"<think>\nhm\n</think>\n\nGrüße!\n{CALL}\n{CALL}"))
    whole = ask(server, tools=TOOLS)
    events = stream(server, tools=TOOLS)
    kinds = [event["type"].removeprefix("response.") for event in events]
    shape = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    item, call = ["output_item.added", "content_part.added"], ["output_item.added", "function_call_arguments.delta"]
    closed = ["content_part.done", "output_item.done"]
    assert shape == [
        "created",
        "in_progress",
        *item, "reasoning_text.delta", "reasoning_text.done", *closed,
        *item, "output_text.delta", "output_text.done", *closed,
        *call, "function_call_arguments.done", "output_item.done",
        *call, "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    told = _without_ids(events[-1]["response"])
    assert told == _without_ids(whole)
    assert events[0]["response"]["output"] == []
    assert {event["response"]["id"] for event in events if "response" in event} == {events[0]["response"]["id"]}
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call", "function_call"]
    for number, item in enumerate(done):
        deltas = [event["delta"] for event in events if event.get("output_index") == number and "delta" in event]
        assert "".join(deltas) == (item.get("arguments") or item["content"][0]["text"])
        assert {event["item_id"] for event in events if event.get("output_index") == number and "item_id" in event} == {
            item["id"]
        }
    assert json.loads(done[2]["arguments"]) == {"open": True}
    assert done[2]["call_id"] != done[3]["call_id"]


def _without_ids(response: dict[str, Any]) -> dict[str, Any]:
    items = [{**item, "id": "", "call_id": ""} for item in response["output"]]
    usage = {**response["usage"], "input_tokens_details": {}}
    return {**response, "id": "", "created_at": 0, "timings": {}, "output": items, "usage": usage}


def test_an_answer_that_is_cut_off_is_incomplete(server: Served) -> None:
    response = ask(server, max_output_tokens=3)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (response["output"][0]["status"], texts(response)) == ("incomplete", ["You"])
    assert stream(server, max_output_tokens=3)[-1]["type"] == "response.incomplete"


def test_an_empty_answer_is_an_empty_message(serve: Serve) -> None:
    assert texts(ask(serve(FakeEngine(reply=lambda _: "")))) == [""]


def test_a_failure(serve: Serve) -> None:
    server = serve(FakeEngine(fail_after=3))
    last = stream(server)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    response = server.client.post(RESPONSES, json={"input": "Hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")


def test_a_schema_holds(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: '{"x": 3}'))
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    form = {"type": "json_schema", "name": "point", "strict": True, "schema": schema}
    response = ask(server, text={"format": form, "verbosity": "low"})
    assert json.loads(texts(response)[0]) == {"x": 3}
    assert response["text"] == {"format": form}


def test_log_probabilities(server: Served) -> None:
    events = stream(server, include=["message.output_text.logprobs"], top_logprobs=1, max_output_tokens=3)
    told = [entry for event in events if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    assert [entry["token"] for entry in told] == ["Y", "o", "u"]
    assert len(told[0]["top_logprobs"]) == 1
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == told


class TestInput:
    def chat(self, items: Any, **fields: Any) -> list[dict[str, Any]]:
        return to_chat(parse_response({"input": items, **fields})).messages

    def test_messages(self) -> None:
        items = [
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "b"}],
                "id": "msg_1",
                "status": "completed",
            },
            {"role": "user", "content": "c"},
        ]
        assert self.chat(items, instructions="Be kind.") == [
            {"role": "system", "content": "Be kind.\n\nBe brief."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]

    def test_what_a_turn_consists_of_becomes_one_message(self) -> None:
        items = [
            {"role": "user", "content": "Open it."},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "content": "Sure."},
            {"type": "function_call", "call_id": "1", "name": "valve", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "valve", "arguments": '{"open": true}'},
            {"type": "function_call_output", "call_id": "1", "output": "done"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "done"}]},
            {"role": "assistant", "content": "Done."},
        ]
        user, turn, first, second, last = self.chat(items)
        assert (turn["content"], turn["reasoning_content"]) == ("Sure.", "hm")
        assert [call["id"] for call in turn["tool_calls"]] == ["1", "2"]
        assert turn["tool_calls"][1]["function"] == {"name": "valve", "arguments": '{"open": true}'}
        assert (first["role"], first["tool_call_id"], second["content"]) == ("tool", "1", "done")
        assert (user["role"], last) == ("user", {"role": "assistant", "content": "Done."})

    def test_the_output_of_a_response_is_input_of_the_next(self, serve: Serve) -> None:
        server = serve(FakeEngine(reply=lambda _: f"<think>\nhm\n</think>\n\nOpening.\n{CALL}"))
        first = ask(server, tools=TOOLS)
        call = first["output"][-1]
        items = [
            {"role": "user", "content": "Open it."},
            *first["output"],
            {"type": "function_call_output", "call_id": call["call_id"], "output": "done"},
        ]
        assert ask(server, input=items, tools=TOOLS)["status"] == "completed"

    def test_fields_arrive(self) -> None:
        request = to_chat(
            parse_response(
                {
                    "input": "a",
                    "tools": TOOLS,
                    "tool_choice": {"type": "function", "name": "valve"},
                    "reasoning": {"effort": "low", "summary": "auto"},
                    "parallel_tool_calls": False,
                    "max_output_tokens": 9,
                    "temperature": 0.5,
                    "seed": 3,
                }
            )
        )
        assert [tool.function.name for tool in request.forced_tools] == ["valve"]
        assert (request.thinking_limit, request.token_limit, request.temperature, request.seed) == (512, 9, 0.5, 3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": [], "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": [], "text": "a"}]}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": {}}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0].output"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "pump"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "strin"}}}}, "text.format"),
        ({"reasoning": {"effort": "lots"}}, "reasoning.effort"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_refusals_name_the_field(server: Served, fields: dict[str, Any], param: str) -> None:
    for streamed in (False, True):
        error = _error(server.client.post(RESPONSES, json={"input": "Hi", **fields, "stream": streamed}))
        assert error["param"] == param
        assert error["hint"]


def test_a_prompt_that_does_not_fit_is_refused_before_the_stream(serve: Serve) -> None:
    server = serve(FakeEngine(context_length=128))
    for streamed in (False, True):
        error = _error(server.client.post(RESPONSES, json={"input": "x" * 200, "stream": streamed}))
        assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


def test_a_choice_without_tools_means_nothing() -> None:
    assert to_chat(parse_response({"input": "a", "tools": [], "tool_choice": "auto"})).tool_choice is None
    with pytest.raises(RequestError):
        parse_response({"input": "a", "tool_choice": "always"})


def _error(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400
    error: dict[str, Any] = response.json()["error"]
    return error
