"""What goes wrong in other servers: how streams end, what figures add up to, what scraping costs, what errors name."""

import json
import re
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from edge.settings.server import ServerSettings
from tests.fakes import FakeEngine, make_service
from tests.serving import Served, serving, wait_for

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stop": "said"}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 2}),
    ("/v1/completions", {"prompt": ["Hi", "Ho"], "n": 2}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/messages", {**CHAT, "max_tokens": 20}),
]
Serve = Callable[..., Served]


@pytest.mark.parametrize("engine", [{}, {"fail_after": 3}, {"context_length": 64}])
@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_stream_ends_cleanly_and_its_connection_goes_on(
    serve: Serve, engine: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    server = serve(FakeEngine(**engine))
    payload = json.dumps({**body, "stream": True}).encode()
    with server.connect() as sock:
        for _ in range(2):
            sock.sendall(
                b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
                % (path.encode(), len(payload), payload)
            )
            head, text = _read_chunked(sock)
            assert head.startswith(b"HTTP/1.1 200")
            assert text.endswith(b"\n\n")


def _read_chunked(sock: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of a chunked response, which has to end with the empty chunk."""
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n"):
        more = sock.recv(65536)
        assert more, "the connection was closed in the midst of the body"
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    text = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        text, rest = text + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return head, text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 200}]}),
        ("/v1/completions", {"prompt": "x" * 200}),
        ("/v1/responses", {"input": "x" * 200}),
        ("/v1/embeddings", {"input": "x" * 200}),
    ],
)
def test_what_does_not_fit_is_told_in_numbers(serve: Serve, path: str, body: dict[str, Any]) -> None:
    server = serve(FakeEngine(context_length=128))
    error = server.client.post(path, json=body).json()["error"]
    num_prompt, num_context = map(int, re.findall(r"\d+", error["message"]))
    assert (num_prompt >= 200, num_context) == (True, 128)


def test_counters_equal_the_sum_of_requests(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda prompt: "fail" if "boom" in prompt else "Hello"))
    usages = [
        server.client.post("/v1/chat/completions", json=body).json()["usage"]
        for body in (CHAT, {**CHAT, "n": 2}, {**CHAT, "max_tokens": 2})
    ]
    usages.append(server.client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1}).json()["usage"])
    for body in ({}, {"messages": []}, {**CHAT, "model": "another"}):
        assert server.client.post("/v1/chat/completions", json=body).status_code in {400, 404}
    counted = _figures(server.client.get("/metrics").text)
    assert counted["qwedge_output_tokens_total"] == sum(usage["completion_tokens"] for usage in usages)
    # A prompt with two answers is read twice, and known the second time.
    again = usages[1]["prompt_tokens"]
    assert counted["qwedge_prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages) + again
    assert counted['qwedge_requests_total{outcome="stop"}'] == 3
    assert counted['qwedge_requests_total{outcome="length"}'] == 3


def _figures(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_looking_does_not_wake_a_sleeping_model() -> None:
    engine = FakeEngine()
    service = make_service(engine, sleep_after_s=0.05)
    with (
        serving(service, ServerSettings(port=0)) as (host, port),
        httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as ask,
    ):
        wait_for(lambda: engine.asleep)
        naps = engine.naps
        for path in ("/metrics", "/health", "/v1/models", "/openapi.json", "/tokenize"):
            response = ask.post(path, json={"content": "Hi"}) if path == "/tokenize" else ask.get(path)
            assert (path, response.status_code, engine.asleep, engine.naps) == (path, 200, True, naps)
        assert ask.post("/v1/chat/completions", json=CHAT).status_code == 200
        wait_for(lambda: engine.naps > naps)


def test_the_same_seed_is_the_same_text(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: "irrelevant"))
    # With the written letters forbidden, all others are equally probable.
    wanted = {
        **CHAT,
        "temperature": 1.0,
        "max_tokens": 12,
        "logit_bias": dict.fromkeys(map(str, b"irelvant"), -100) | {"258": -100},
        "structured_outputs": {"regex": "[a-z]{12}"},
    }
    texts = [_text(server, {**wanted, "seed": seed}) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    many = server.client.post("/v1/chat/completions", json={**wanted, "seed": 1, "n": 2}).json()["choices"]
    assert [choice["message"]["content"] for choice in many] == [texts[0], texts[2]]


def _text(server: Served, body: dict[str, Any]) -> str:
    return str(server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])
