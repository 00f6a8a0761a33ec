"""Anthropic's API over a real server: messages, streams, tools, counts, errors."""

import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from edge.anthropic import parse_messages, to_chat
from tests.edge.http.malformed import odd_bodies
from tests.fakes import MODEL_NAME, FakeEngine
from tests.serving import Served, wait_for

PATH = "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]
BODY: dict[str, Any] = {"model": MODEL_NAME, "max_tokens": 100, "messages": HI}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {
    "name": "f",
    "description": "does f",
    "input_schema": SCHEMA,
}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
SEED = 20261122
Serve = Callable[..., Served]


def test_a_message(server: Served) -> None:
    body = server.client.post(PATH, json=BODY, headers={"anthropic-version": "2023-06-01"}).json()
    assert body["id"].startswith("msg_")
    assert {name: body[name] for name in body if name not in {"id", "usage"}} == {
        "type": "message",
        "role": "assistant",
        "model": MODEL_NAME,
        "content": [{"type": "text", "text": "You said: Hi"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    assert body["usage"]["output_tokens"] == 13
    assert body["usage"]["input_tokens"] == _count(server, BODY)


def test_a_stream_says_the_same_as_the_message(serve: Serve) -> None:
    text = "Grüße, 世界 👩‍🚀! \u2028 \r\n data: {} \n\n event: x"
    thoughts_and_all = f"<think>\nhm\n</think>\n\n{text}\n{CALL}"
    server = serve(FakeEngine(reply=lambda _: thoughts_and_all))
    wanted = {**BODY, "max_tokens": 500, "tools": [TOOL], "thinking": {"type": "enabled", "budget_tokens": 99}}
    whole = server.client.post(PATH, json=wanted).json()
    events = _stream(server, wanted)
    told = _accumulate(events)
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    assert whole["content"][:2] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": text},
    ]
    for message in (whole, told):
        message["content"][2].pop("id")
        message.pop("id")
        assert message.pop("usage")["output_tokens"] == len(thoughts_and_all.encode()) + 1
    assert told == whole
    assert whole["content"][2] == {"type": "tool_use", "name": "f", "input": {"a": 1}}
    assert whole["stop_reason"] == "tool_use"


def test_the_order_of_a_streams_events(server: Served) -> None:
    kinds = [event["type"] for event in _stream(server, BODY)]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) == {"content_block_delta"}


@pytest.mark.parametrize(
    ("extra", "reason", "sequence"),
    [
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["x", " said"]}, "stop_sequence", " said"),
        ({"stop_sequences": ["nowhere"]}, "end_turn", None),
    ],
)
def test_why_a_message_ended(server: Served, extra: dict[str, Any], reason: str, sequence: str | None) -> None:
    body = server.client.post(PATH, json=BODY | extra).json()
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)
    assert body["content"][0]["text"] == ("You" if reason != "end_turn" else "You said: Hi")
    delta = _stream(server, BODY | extra)[-2]
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_what_the_model_is_shown(serve: Serve) -> None:
    prompts: list[str] = []
    server = serve(FakeEngine(reply=lambda prompt: prompts.append(prompt) or "ok"))  # type: ignore[func-returns-value]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "let me see"},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "7"}]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no", "is_error": True},
                {"type": "tool_result", "tool_use_id": "toolu_3"},
                {"type": "text", "text": "and now?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    system = [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]
    server.client.post(PATH, json={**BODY, "system": system, "messages": messages, "tools": [TOOL]})
    function = {"name": "f", "description": "does f", "parameters": SCHEMA}
    assert prompts[-1].splitlines() == [
        "<|im_start|>system", "# Tools", json.dumps({"type": "function", "function": function}), "<|im_end|>",
        "<|im_start|>system", "be", "brief<|im_end|>",
        "<|im_start|>user", "one", "two<|im_end|>",
        "<|im_start|>assistant", *f"let me see{CALL}<|im_end|>".splitlines(),
        "<|im_start|>tool", "7<|im_end|>",
        "<|im_start|>tool", "Error: no<|im_end|>",
        "<|im_start|>tool", "<|im_end|>",
        "<|im_start|>user", "and now?<|im_end|>",
        "<|im_start|>assistant", "<think>", "", "</think>", "",
    ]  # fmt: skip


def test_a_last_message_of_the_assistants_is_continued(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda prompt: prompt[-12:]))
    body = server.client.post(
        PATH, json={**BODY, "messages": [*HI, {"role": "assistant", "content": "I think"}]}
    ).json()
    assert body["content"][0]["text"].endswith("I think")


class TestTools:
    @pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "f"}])
    def test_a_call_can_be_forced(self, serve: Serve, choice: dict[str, Any]) -> None:
        server = serve(FakeEngine(reply=lambda _: CALL))
        body = server.client.post(PATH, json={**BODY, "tools": [TOOL], "tool_choice": choice}).json()
        assert [block["type"] for block in body["content"]] == ["tool_use"]
        assert body["content"][0]["input"] == {"a": 1}

    def test_none_forbids_calls(self, serve: Serve) -> None:
        server = serve(FakeEngine(reply=lambda _: CALL))
        body = server.client.post(PATH, json={**BODY, "tools": [TOOL], "tool_choice": {"type": "none"}}).json()
        assert body["content"] == [{"type": "text", "text": CALL}]
        assert body["stop_reason"] == "end_turn"

    @pytest.mark.parametrize(("single", "count"), [(False, 2), (True, 1)])
    def test_several_calls_or_one(self, serve: Serve, single: bool, count: int) -> None:
        server = serve(FakeEngine(reply=lambda _: f"{CALL}\n{CALL}"))
        choice = {"type": "auto", "disable_parallel_tool_use": single}
        wanted = {**BODY, "max_tokens": 200, "tools": [TOOL], "tool_choice": choice}
        assert len(server.client.post(PATH, json=wanted).json()["content"]) == count
        starts = [event for event in _stream(server, wanted) if event["type"] == "content_block_start"]
        assert len(starts) == count
        assert len({event["content_block"]["id"] for event in starts}) == count


def test_json_by_a_schema(server: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    wanted = {**BODY, "output_config": {"format": {"type": "json_schema", "schema": schema}}}
    assert json.loads(server.client.post(PATH, json=wanted).json()["content"][0]["text"]) == {"a": 1}


def test_thoughts_are_content_where_no_thinking_was_asked_for(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: "<think>hm</think>so"))
    for thinking in ({}, {"thinking": {"type": "disabled"}}):
        assert server.client.post(PATH, json=BODY | thinking).json()["content"][0]["type"] == "text"
    thinks = server.client.post(PATH, json={**BODY, "thinking": {"type": "adaptive"}}).json()
    assert [block["type"] for block in thinks["content"]] == ["thinking", "text"]


@pytest.mark.parametrize(
    ("extra", "thinks", "limit"),
    [
        ({}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 7}}, True, 7),
        ({"thinking": {"type": "adaptive"}}, True, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, True, 512),
    ],
)
def test_how_long_a_model_thinks(extra: dict[str, Any], thinks: bool, limit: int | None) -> None:
    chat = to_chat(parse_messages(BODY | extra))
    assert (chat.thinking, chat.thinking_limit) == (thinks, limit)


def test_tokens_are_counted_as_the_message_counts_them(server: Served) -> None:
    wanted = {"messages": HI, "system": "be brief", "tools": [TOOL]}
    usage = server.client.post(PATH, json=BODY | wanted).json()["usage"]
    assert usage["input_tokens"] == _count(server, wanted)
    assert _count(server, wanted) > _count(server, {"messages": HI}) > 0


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"max_tokens": None}, "max_tokens"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "canary"}]}]}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
            ({"system": [IMAGE]}, "messages"),
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
            ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
            ({"tool_choice": {"type": "any"}}, "tool_choice"),
            ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "canary"}}, "tool_choice.name"),
            ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens"),
            ({"stop_sequences": [""]}, "stop_sequences[0]"),
            ({"temperature": 3}, "temperature"),
            ({"temperature": "0.7"}, "temperature"),
            ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ],
    )
    def test_a_bad_request(self, server: Served, change: dict[str, Any], param: str) -> None:
        error = _error(server.client.post(PATH, json=BODY | change), 400, "invalid_request_error")
        assert error["param"] == param
        assert error["hint"] in error["message"]
        assert "canary" not in error["message"]

    @pytest.mark.parametrize(
        ("method", "path", "status", "kind"),
        [
            ("GET", PATH, 405, "invalid_request_error"),
            ("POST", f"{PATH}/batches", 404, "not_found_error"),
            ("POST", PATH, 400, "invalid_request_error"),
        ],
    )
    def test_every_path_answers_in_anthropics_shape(
        self, server: Served, method: str, path: str, status: int, kind: str
    ) -> None:
        _error(server.client.request(method, path), status, kind)

    def test_another_model(self, server: Served) -> None:
        response = server.client.post(PATH, json=BODY | {"model": "claude-opus-4-5"})
        assert MODEL_NAME in _error(response, 404, "not_found_error")["message"]

    def test_anthropics_clients_get_its_shape_elsewhere_too(self, server: Served) -> None:
        headers = {"anthropic-version": "2023-06-01"}
        _error(server.client.get("/v1/models/claude-opus-4-5", headers=headers), 404, "not_found_error")

    def test_what_the_guard_refuses(self, serve: Serve) -> None:
        server = serve(max_body_bytes=2000)
        large = {**BODY, "messages": [{"role": "user", "content": "x" * 3000}]}
        _error(server.client.post(PATH, json=large), 413, "request_too_large")
        _error(server.client.post(PATH, json=BODY, headers={"host": "evil.example"}), 400, "invalid_request_error")

    def test_a_prompt_that_does_not_fit(self, serve: Serve) -> None:
        server = serve(FakeEngine(context_length=64))
        for stream in (False, True):
            response = server.client.post(PATH, json={**BODY, "system": "x" * 100, "stream": stream})
            assert _error(response, 400, "invalid_request_error")["code"] == "context_length_exceeded"

    def test_a_full_queue_is_429_with_retry_after(self, serve: Serve) -> None:
        server = serve(FakeEngine(slots=1), max_queue=1)
        with server.occupied():
            response = server.client.post(PATH, json=BODY)
            _error(response, 429, "rate_limit_error")
            assert int(response.headers["retry-after"]) >= 1

    def test_a_failure_in_mid_stream_is_the_last_event(self, serve: Serve) -> None:
        server = serve(FakeEngine(fail_after=3))
        assert _error(server.client.post(PATH, json=BODY), 500, "api_error")["code"] == "engine_failed"
        events = _stream(server, BODY)
        assert events[0]["type"] == "message_start"
        assert (events[-1]["type"], events[-1]["error"]["type"]) == ("error", "api_error")

    def test_malformed_bodies_get_no_5xx(self, serve: Serve) -> None:
        print(f"seed {SEED}")
        server = serve(FakeEngine(reply=lambda _: "ok", context_length=512))
        rng = random.Random(SEED)
        fields = (
            "messages",
            "system",
            "tools",
            "tool_choice",
            "thinking",
            "max_tokens",
            "stop_sequences",
            "stream",
            "top_k",
        )
        statuses = [
            (server.client.post(rng.choice((PATH, f"{PATH}/count_tokens")), content=body).status_code, body)
            for body in odd_bodies(rng, 400, {"max_tokens": 2, "messages": HI}, fields)
        ]
        assert [(status, body) for status, body in statuses if status >= 500] == []
        assert sum(status == 400 for status, _ in statuses) > 150


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_message(serve: Serve, stream: bool) -> None:
    server = serve(FakeEngine(reply=lambda _: "x" * 3000, step_s=0.002))
    body = json.dumps({**BODY, "max_tokens": 3000, "stream": stream}).encode()
    with server.connect() as sock:
        sock.sendall(
            b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_for(lambda: server.engine.num_steps > 5)
    wait_for(lambda: server.service.stats().num_running == 0)
    assert server.engine.num_steps < 1000


def test_a_waiting_stream_pings(serve: Serve) -> None:
    server = serve(FakeEngine(slots=1, step_s=0.05))
    with server.occupied(), server.going_on(lambda: server.service.stats().num_waiting == 2):
        kinds = [event["type"] for event in _stream(server, BODY)]
    assert kinds.count("ping") >= 2
    assert kinds[-1] == "message_stop"


def _count(server: Served, body: dict[str, Any]) -> int:
    return int(server.client.post(f"{PATH}/count_tokens", json=body).json()["input_tokens"])


def _stream(server: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = server.client.post(PATH, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    blocks = [block.split("\n") for block in response.text.split("\n\n")[:-1] if not block.startswith(":")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    return events


def _accumulate(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream."""
    message: dict[str, Any] = events[0]["message"]
    arguments = ""
    for event in events[1:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                arguments = ""
            case "content_block_delta":
                delta = dict(event["delta"])
                kind = delta.pop("type")
                if kind == "input_json_delta":
                    arguments += delta["partial_json"]
                else:
                    (name,) = delta
                    message["content"][-1][name] += delta[name]
            case "content_block_stop" if arguments:
                message["content"][-1]["input"] = json.loads(arguments)
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    return message


def _error(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert response.status_code == status
    body = response.json()
    assert body["type"] == "error"
    error: dict[str, Any] = body["error"]
    assert error["type"] == kind
    return error
