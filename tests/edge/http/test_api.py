"""The HTTP API over a real server: answers, streams, errors, health, cancelling, overload."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.fakes import MODEL_NAME, FakeEngine
from tests.serving import Served, wait_for

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
SEED = 20261121
Serve = Callable[..., Served]


def test_a_chat_answer(server: Served) -> None:
    body = server.client.post(CHAT, json={"messages": MESSAGES, "model": MODEL_NAME}).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "You said: Hi"}
    assert body["choices"][0]["finish_reason"] == "stop"
    # 12 letters and the token that ends the turn.
    assert body["usage"]["completion_tokens"] == 13
    assert body["timings"]["ttft_ms"] > 0


def test_a_text_completion(server: Served) -> None:
    body = server.client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3}).json()
    assert body["choices"][0] == {"index": 0, "text": "You", "logprobs": None, "finish_reason": "length"}


def test_a_stream_says_the_same_as_the_answer(serve: Serve) -> None:
    text = "Grüße, 世界 👩‍🚀! \u2028 \r\n data: [DONE] \n\n done"
    server = serve(FakeEngine(reply=lambda _: text))
    whole = server.client.post(CHAT, json={"messages": MESSAGES}).json()["choices"][0]["message"]["content"]
    chunks = list(_stream(server, {"messages": MESSAGES, "stream_options": {"include_usage": True}}))
    pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == whole == text
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(text.encode()) + 1


def test_stop_strings_end_the_answer(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: "one two three"))
    for stop in ("two", ["x", " two"]):
        body = server.client.post(CHAT, json={"messages": MESSAGES, "stop": stop}).json()
        assert body["choices"][0]["message"]["content"].strip() == "one"
        assert body["choices"][0]["finish_reason"] == "stop"


def test_tools(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    body = server.client.post(CHAT, json={"messages": MESSAGES, "tools": tools}).json()
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    answered = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "7"},
    ]
    assert server.client.post(CHAT, json={"messages": answered, "tools": tools}).status_code == 200


def test_a_long_answer_ends_at_the_context(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: "x" * 10_000, context_length=128))
    body = server.client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2**31 - 1}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 128


def test_an_answer_goes_on_past_its_end_where_that_is_asked_for(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: "short"))
    body = server.client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 40, "ignore_eos": True}).json()
    assert (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == ("length", 40)


def test_a_prompt_that_does_not_fit_is_refused_before_the_stream(serve: Serve) -> None:
    server = serve(FakeEngine(context_length=128))
    messages = [{"role": "user", "content": "x" * 200}]
    for stream in (False, True):
        response = server.client.post(CHAT, json={"messages": messages, "stream": stream})
        error = _error(response, 400)
        assert error["code"] == "context_length_exceeded"
        assert "128" in error["message"]


def test_models(server: Served) -> None:
    (model,) = server.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == (MODEL_NAME, "model")
    assert server.client.get(f"/v1/models/{MODEL_NAME}").json() == model


class TestErrors:
    @pytest.mark.parametrize(
        ("method", "path", "status", "code"),
        [
            ("GET", "/nope", 404, "not_found"),
            ("GET", "/docs", 404, "not_found"),
            ("GET", "/static/../app.py", 404, "not_found"),
            ("GET", "/static/%2e%2e/app.py", 404, "not_found"),
            ("GET", "/static/missing.js", 404, "not_found"),
            ("POST", "/static/favicon.svg", 405, "method_not_allowed"),
            ("GET", CHAT, 405, "method_not_allowed"),
            ("DELETE", "/health", 405, "method_not_allowed"),
            ("GET", "/v1/models/gpt-4", 404, "model_not_found"),
            ("POST", CHAT, 400, "invalid_request"),
        ],
    )
    def test_every_path_answers_in_openais_shape(
        self, server: Served, method: str, path: str, status: int, code: str
    ) -> None:
        assert _error(server.client.request(method, path), status)["code"] == code

    def test_an_unknown_model_is_404(self, server: Served) -> None:
        response = server.client.post(CHAT, json={"messages": MESSAGES, "model": "gpt-4"})
        assert _error(response, 404)["param"] == "model"

    def test_an_engine_failure_is_500_and_the_next_request_works(self, serve: Serve) -> None:
        server = serve(FakeEngine(fail_after=3))
        assert _error(server.client.post(CHAT, json={"messages": MESSAGES}), 500)["code"] == "engine_failed"
        assert server.client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2}).status_code == 200

    def test_a_stream_that_fails_ends_with_the_error_and_done(self, serve: Serve) -> None:
        server = serve(FakeEngine(fail_after=3))
        response = server.client.post(CHAT, json={"messages": MESSAGES, "stream": True})
        events = _events(response.text)
        assert json.loads(events[-2])["error"]["code"] == "engine_failed"
        assert events[-1] == "[DONE]"

    def test_our_own_fault_is_a_clean_500(self, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server.service, "stats", lambda: 1 / 0)
        response = server.client.get("/health")
        assert _error(response, 500)["message"] == "internal error"
        assert response.headers["x-request-id"]

    def test_a_body_over_the_limit_is_413(self, serve: Serve) -> None:
        server = serve(max_body_bytes=2000)
        large = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode()
        assert _error(server.client.post(CHAT, content=large), 413)["code"] == "too_large"

        def chunked() -> Iterator[bytes]:
            for _ in range(30):
                yield b" " * 1000

        assert _error(server.client.post(CHAT, content=chunked()), 413)["code"] == "too_large"
        assert server.client.post(CHAT, json={"messages": MESSAGES}).status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "127.0.0.1.nip.io"]
    )
    def test_foreign_hosts_are_refused(self, server: Served, host: str) -> None:
        assert "Host" in _error(server.client.get("/health", headers={"host": host}), 400)["message"]

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1", "[::1]:9", "192.168.1.7:8080"])
    def test_own_names_and_addresses_are_answered(self, server: Served, host: str) -> None:
        assert server.client.get("/health", headers={"host": host}).status_code == 200

    def test_posts_from_other_sites_are_refused(self, server: Served) -> None:
        for origin in ("http://evil.example", "null", f"http://127.0.0.1:{server.port + 1}"):
            response = server.client.post(CHAT, json={"messages": MESSAGES}, headers={"origin": origin})
            _error(response, 400)
        response = server.client.post(CHAT, json={"messages": MESSAGES}, headers={"origin": server.url})
        assert response.status_code == 200
        assert not any(name.startswith("access-control") for name in response.headers)


class TestHealth:
    def test_ok(self, server: Served) -> None:
        body = server.client.get("/health").json()
        assert body["status"] == "ok"
        assert body["queue"] == {"waiting": 0, "running": 0, "slots": 2, "max_waiting": 8}

    def test_stalled_when_the_engine_hangs(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edge.scheduler_stats.STALLED_AFTER_S", 0.2)
        server = serve()
        server.engine.gate.clear()
        with server.asking():
            wait_for(lambda: server.client.get("/health").status_code == 503)
            body = server.client.get("/health").json()
            assert body["status"] == "stalled"
            assert body["queue"]["running"] == 1
            server.engine.gate.set()
        wait_for(lambda: server.client.get("/health").status_code == 200)

    def test_draining_refuses_and_says_so(self, serve: Serve) -> None:
        server = serve(FakeEngine(step_s=0.05))
        with server.asking() as answered:
            wait_for(lambda: server.service.stats().num_running == 1)
            stopping = threading.Thread(target=server.service.stop, args=(10,))
            stopping.start()
            wait_for(lambda: not server.service.stats().accepting)
            health = server.client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "draining")
            refused = server.client.post(CHAT, json={"messages": MESSAGES})
            assert _error(refused, 503)["code"] == "unavailable"
            assert refused.headers["retry-after"] == "5"
            stopping.join()
        # What ran when the server was told to stop came to its end.
        assert answered() == 200

    def test_metrics_count_what_happened(self, serve: Serve) -> None:
        server = serve()
        server.client.post(CHAT, json={"messages": MESSAGES})
        server.client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1})
        text = server.client.get("/metrics").text
        assert 'qwedge_requests_total{outcome="stop"} 1.0' in text
        assert 'qwedge_requests_total{outcome="length"} 1.0' in text
        assert "qwedge_output_tokens_total 14.0" in text


class TestLoad:
    def test_more_requests_than_slots_are_all_answered(self, serve: Serve) -> None:
        server = serve(FakeEngine(step_s=0.001), max_queue=32)
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda i: _ask(server, f"number {i}"), range(24)))
        assert answers == [f"You said: number {i}" for i in range(24)]

    def test_a_full_queue_is_429_with_retry_after(self, serve: Serve) -> None:
        server = serve(FakeEngine(slots=1), max_queue=1)
        with server.occupied():
            for stream in (False, True):
                response = server.client.post(CHAT, json={"messages": MESSAGES, "stream": stream})
                assert _error(response, 429)["type"] == "rate_limit_error"
                assert int(response.headers["retry-after"]) >= 1

    def test_a_waiting_stream_tells_its_place(self, serve: Serve) -> None:
        server = serve(FakeEngine(slots=1, step_s=0.05))
        with server.occupied(), server.going_on(lambda: server.service.stats().num_waiting == 2):
            text = server.client.post(CHAT, json={"messages": MESSAGES, "stream": True}).text
        assert text.startswith(": queued position=1 eta_s=")
        assert ": queued position=0 " in text


class TestDisconnect:
    """A client that goes away stops its generation, wherever it is."""

    @pytest.mark.parametrize("stream", [True, False])
    def test_in_decode(self, serve: Serve, stream: bool) -> None:
        server = serve(FakeEngine(reply=lambda _: "x" * 3000, step_s=0.002))
        self._leave(server, stream=stream, when=lambda: server.engine.num_steps > 5)
        assert server.engine.num_steps < 1000

    @pytest.mark.parametrize("stream", [True, False])
    def test_in_prefill(self, serve: Serve, stream: bool) -> None:
        server = serve(FakeEngine(step_s=0.02, prefill_chunk=4))
        self._leave(server, stream=stream, when=lambda: server.engine.num_steps > 5, prompt="x" * 3000)
        assert server.engine.num_steps < 200

    @pytest.mark.parametrize("stream", [True, False])
    def test_in_the_queue(self, serve: Serve, stream: bool) -> None:
        server = serve(FakeEngine(reply=lambda _: "x" * 300, slots=1, step_s=0.005))
        with server.asking() as first:
            wait_for(lambda: server.service.stats().num_running == 1)
            self._leave(server, stream=stream, when=lambda: server.service.stats().num_waiting == 1, idle=False)
            wait_for(lambda: server.service.stats().num_waiting == 0)
            assert server.service.stats().num_running == 1
        assert first() == 200

    def _leave(
        self, server: Served, *, stream: bool, when: Callable[[], bool], prompt: str = "Hi", idle: bool = True
    ) -> None:
        body = json.dumps({"messages": [{"role": "user", "content": prompt}], "stream": stream}).encode()
        with server.connect() as sock:
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_for(when)
        if idle:
            wait_for(lambda: server.service.stats().num_running == 0)
            assert 'outcome="cancelled"' in server.client.get("/metrics").text


def test_headers_of_every_response(server: Served) -> None:
    for path in ("/", "/health", "/nope", "/static/favicon.svg", "/openapi.json"):
        headers = server.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-request-id"]
        assert headers["cache-control"] == ("no-cache" if path in {"/", "/static/favicon.svg"} else "no-store")


def test_a_request_id_is_kept_if_it_is_harmless(server: Served) -> None:
    assert server.client.get("/health", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    for bad in ("a b", "x" * 65, "<script>"):
        assert server.client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def test_nothing_that_was_said_is_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="edge")
    server = serve(FakeEngine(fail_after=9))
    canary = "canary-4711"
    for body in ({"messages": [{"role": "user", "content": canary}]}, {"messages": canary}, {"prompt": canary}):
        server.client.post(CHAT, json=body)
        server.client.post("/v1/completions", json=body)
    server.client.post(f"/nope%0aforged%20line?{canary}", content=canary)
    # Ours only: the client of this test logs too, where an earlier test has switched that on.
    lines = "\n".join(caplog.handler.format(record) for record in caplog.records if record.name.startswith("edge"))
    assert "POST" in lines
    assert canary not in lines
    assert not any(line.startswith("forged") for line in lines.splitlines())


def _ask(server: Served, text: str) -> str:
    body = httpx.post(server.url + CHAT, json={"messages": [{"role": "user", "content": text}]}, timeout=60).json()
    return str(body["choices"][0]["message"]["content"])


def _stream(server: Served, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    response = server.client.post(CHAT, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = _events(response.text)
    assert events[-1] == "[DONE]"
    return map(json.loads, events[:-1])


def _events(text: str) -> list[str]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def _error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code", "hint"} <= error.keys()
    return error
