"""Several answers to one request over HTTP: ``n``, and batches of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.fakes import FakeEngine
from tests.serving import Served, wait_for

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
Serve = Callable[..., Served]


def lines_of(response: httpx.Response) -> list[str]:
    assert response.status_code == 200
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]


def busy(server: Served) -> int:
    stats = server.service.stats()
    return stats.num_running + stats.num_waiting


def test_choices_of_a_chat(server: Served) -> None:
    body = server.client.post(CHAT, json={"messages": MESSAGES, "n": 3}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["You said: Hi"] * 3
    alone = server.client.post(CHAT, json={"messages": MESSAGES}).json()
    assert body["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 3 * alone["usage"]["completion_tokens"]


def test_the_most_choices(serve: Serve) -> None:
    server = serve()
    assert len(server.client.post(CHAT, json={"messages": MESSAGES, "n": 8}).json()["choices"]) == 8


def test_a_batch_of_prompts_comes_prompt_by_prompt(serve: Serve) -> None:
    server = serve(FakeEngine(reply=str.upper))
    body = server.client.post(TEXT, json={"prompt": ["ab", "c", [100, 101]], "n": 2}).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [choice["text"] for choice in body["choices"]] == ["AB", "AB", "C", "C", "DE", "DE"]
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["completion_tokens"] == 2 * (3 + 2 + 3)


def test_choices_are_streamed_side_by_side(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: "abcdefghijklmnopqrstuvwxyz", step_s=0.002))
    body = {"messages": MESSAGES, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    response = server.client.post(CHAT, json=body)
    lines = lines_of(response)
    assert lines.pop() == "[DONE]"
    *chunks, last = map(json.loads, lines)
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    indices = [chunk["choices"][0]["index"] for chunk in chunks]
    assert indices != sorted(indices)
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "abcdefghijklmnopqrstuvwxyz"
        assert [choice["delta"].get("role") for choice in own] == ["assistant"] + [None] * (len(own) - 1)
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 54)
    assert response.text.count(": queued") == 1


def test_the_queue_takes_all_or_none(serve: Serve) -> None:
    server = serve(FakeEngine(slots=1), max_queue=3)
    with server.occupied():
        for stream in (False, True):
            response = server.client.post(CHAT, json={"messages": MESSAGES, "n": 3, "stream": stream})
            assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
            assert server.service.stats().num_waiting == 1
    assert server.client.post(CHAT, json={"messages": MESSAGES, "n": 3}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": MESSAGES, "n": 3}, "n"),
        (TEXT, {"prompt": "a", "n": 3}, "n"),
        (TEXT, {"prompt": ["a", "b", "c"]}, "prompt"),
        (TEXT, {"prompt": ["a", "x" * 5000]}, "messages"),
        (TEXT, {"prompt": [[1], [99999]]}, "prompt"),
        (TEXT, {"prompt": [10**20]}, "prompt"),
        (TEXT, {"prompt": [5, -1]}, "prompt"),
        (TEXT, {"prompt": "a", "n": 9}, "n"),
        (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": MESSAGES, "echo": True}, "echo"),
    ],
)
def test_what_can_never_be_answered_is_refused(serve: Serve, path: str, body: dict[str, Any], param: str) -> None:
    server = serve(max_queue=2)
    response = server.client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["hint"]
    assert busy(server) == 0


@pytest.mark.parametrize("stream", [True, False])
def test_going_away_ends_all_choices(serve: Serve, stream: bool) -> None:
    server = serve(FakeEngine(reply=lambda _: "x" * 3000, step_s=0.002))
    body = json.dumps({"messages": MESSAGES, "n": 4, "stream": stream}).encode()
    with server.connect() as sock:
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body))
        sock.sendall(head + body)
        wait_for(lambda: server.engine.num_steps > 20)
        assert busy(server) == 4
    wait_for(lambda: busy(server) == 0)
    assert 'outcome="cancelled"} 4.0' in server.client.get("/metrics").text


def test_one_failure_ends_all_choices(serve: Serve) -> None:
    def reply(prompt: str) -> str:
        if prompt == "bad":
            raise RuntimeError("told to fail")
        return "x" * 3000

    server = serve(FakeEngine(reply=reply, step_s=0.001))
    response = server.client.post(TEXT, json={"prompt": ["good", "bad", "good"]})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
    wait_for(lambda: busy(server) == 0)
    lines = lines_of(server.client.post(TEXT, json={"prompt": ["good", "bad"], "stream": True}))
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["error"]["code"] == "engine_failed"
    wait_for(lambda: busy(server) == 0)
    assert server.engine.num_steps < 3000
