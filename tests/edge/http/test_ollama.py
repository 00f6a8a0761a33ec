"""Ollama's API over a real server: answers, streams, options, tools, the list of models, errors."""

import json
import random
from collections.abc import Callable
from datetime import datetime
from typing import Any

import httpx
import pytest

from edge.chat import ChatTemplate
from edge.ollama import ChatBody, parse, to_openai
from edge.openai import ChatRequest
from edge.settings.server import ServerSettings
from tests.edge.http.malformed import odd_bodies
from tests.fakes import MODEL_NAME, FakeEngine, make_model, make_service
from tests.serving import Served, serving, wait_for

CHAT, GENERATE = "/api/chat", "/api/generate"
HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
SEED = 20261122
Serve = Callable[..., Served]


def test_a_chat_answer(server: Served) -> None:
    body = _ask(server, CHAT, {"messages": HI})
    assert body["message"] == {"role": "assistant", "content": "You said: Hi"}
    assert (body["model"], body["done"], body["done_reason"]) == (MODEL_NAME, True, "stop")
    assert datetime.fromisoformat(body["created_at"]).tzinfo is not None


def test_the_durations_add_up(serve: Serve) -> None:
    server = serve(FakeEngine(step_s=0.002))
    body = _ask(server, GENERATE, {"prompt": "Hi", "raw": True})
    assert (body["prompt_eval_count"], body["eval_count"]) == (2, len("You said: Hi") + 1)
    # In nanoseconds: two milliseconds for each token after the first.
    assert 24_000_000 <= body["eval_duration"] < 5_000_000_000
    parts = body["load_duration"] + body["prompt_eval_duration"] + body["eval_duration"]
    assert abs(body["total_duration"] - parts) < 10


def test_a_generated_answer(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda prompt: prompt))
    plain = _ask(server, GENERATE, {"prompt": "Hi", "system": "be brief"})
    turns = (("system", "be brief"), ("user", "Hi"))
    shown = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert plain["response"] == f"{shown}<|im_start|>assistant\n"
    assert "message" not in plain
    assert _ask(server, GENERATE, {"prompt": "Hi", "raw": True})["response"] == "Hi"


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_a_stream_says_the_same_as_the_answer(serve: Serve, path: str) -> None:
    text = "Grüße, 世界 👩‍🚀! \u2028 \r\n {} \n\n done"
    server = serve(FakeEngine(reply=lambda _: f"<think>\nhm\n</think>\n\n{text}"))
    wanted = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    whole = _ask(server, path, wanted)
    lines = _stream(server, path, wanted)
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["eval_count"] == whole["eval_count"]
    said = [line["message"] if path == CHAT else line for line in lines]
    name = "content" if path == CHAT else "response"
    told = {key: "".join(part.get(key, "") for part in said) for key in (name, "thinking")}
    expected = whole["message"] if path == CHAT else whole
    assert told == {name: expected[name], "thinking": expected["thinking"]} == {name: text, "thinking": "hm"}


def test_a_stream_is_what_comes_unasked(server: Served) -> None:
    response = server.client.post(CHAT, json={"model": MODEL_NAME, "messages": HI})
    assert response.headers["content-type"] == "application/x-ndjson"
    assert len(response.text.splitlines()) > 5


class TestTools:
    def test_a_call(self, serve: Serve) -> None:
        server = serve(FakeEngine(reply=lambda _: f"let me see\n{CALL}"))
        wanted = {"messages": HI, "tools": TOOLS}
        message = _ask(server, CHAT, wanted)["message"]
        lines = _stream(server, CHAT, wanted)
        (told,) = [line["message"]["tool_calls"] for line in lines if "tool_calls" in line["message"]]
        for calls in (message["tool_calls"], told):
            assert calls[0]["function"] == {"index": 0, "name": "f", "arguments": {"a": 1}}
            assert len(calls) == 1
        assert message["content"] == "let me see"

    def test_what_the_model_is_shown_of_calls_and_results(self, serve: Serve) -> None:
        prompts: list[str] = []
        server = serve(FakeEngine(reply=lambda prompt: prompts.append(prompt) or "ok"))  # type: ignore[func-returns-value]
        call = {"function": {"name": "f", "arguments": {"a": 1}}}
        messages = [
            {"role": "system", "content": "be brief"},
            *HI,
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_name": "f", "content": "7"},
        ]
        _ask(server, CHAT, {"messages": messages})
        assert prompts[-1].splitlines() == [
            "<|im_start|>system", "be brief<|im_end|>",
            "<|im_start|>user", "Hi<|im_end|>",
            "<|im_start|>assistant", *f"{CALL}<|im_end|>".splitlines(),
            "<|im_start|>tool", "7<|im_end|>",
            "<|im_start|>assistant",
        ]  # fmt: skip


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "text", "reason"),
        [
            ({"num_predict": 3}, "You", "length"),
            ({"num_predict": -1}, "You said: Hi", "stop"),
            ({"num_predict": 0}, "You said: Hi", "stop"),
            ({"stop": [" said"]}, "You", "stop"),
            ({"stop": "said"}, "You ", "stop"),
            ({"num_ctx": 5}, "You", "length"),
            ({"num_ctx": 1 << 20}, "You said: Hi", "stop"),
            ({"num_ctx": 9, "num_predict": 4, "repeat_last_n": 64, "num_gpu": 1, "mirostat": 0}, "You ", "length"),
        ],
    )
    def test_where_the_answer_ends(self, server: Served, options: dict[str, Any], text: str, reason: str) -> None:
        body = _ask(server, GENERATE, {"prompt": "Hi", "raw": True, "options": options})
        assert (body["response"], body["done_reason"]) == (text, reason)

    def test_all_options_have_a_counterpart(self) -> None:
        options = {"temperature": 0.5, "top_k": 7, "top_p": 0.5, "min_p": 0.1, "seed": 4, "repeat_penalty": 1.5}
        options |= {"presence_penalty": 0.25, "frequency_penalty": 0.75}
        body = parse(ChatBody, {"model": MODEL_NAME, "messages": HI, "options": options})
        wanted = to_openai(make_model(), body).model_dump()
        options["repetition_penalty"] = options.pop("repeat_penalty")
        assert {name: wanted[name] for name in options} == options

    @pytest.mark.parametrize("form", ["json", SCHEMA])
    def test_json(self, serve: Serve, form: Any) -> None:
        server = serve(FakeEngine(reply=lambda _: '{"a": 1}'))
        for path, wanted in ((CHAT, {"messages": HI}), (GENERATE, {"prompt": "Hi"})):
            body = _ask(server, path, {**wanted, "format": form})
            assert json.loads(body["message"]["content"] if path == CHAT else body["response"]) == {"a": 1}

    def test_thinking(self, serve: Serve) -> None:
        server = serve(FakeEngine(reply=lambda _: "<think>hm</think>so"))
        for think in (True, "high", None):
            assert _ask(server, CHAT, {"messages": HI, "think": think})["message"]["thinking"] == "hm"
        assert "thinking" not in _ask(server, CHAT, {"messages": HI, "think": False})["message"]

    @pytest.mark.parametrize(("think", "limit"), [("low", 512), ("high", None), (True, None)])
    def test_levels_of_thinking_are_budgets(self, think: Any, limit: int | None) -> None:
        body = parse(ChatBody, {"model": MODEL_NAME, "messages": HI, "think": think})
        wanted = to_openai(make_model(), body)
        assert isinstance(wanted, ChatRequest)
        assert (wanted.thinking, wanted.thinking_limit) == (True, limit)

    def test_log_probabilities(self, server: Served) -> None:
        wanted = {"messages": HI, "logprobs": True, "top_logprobs": 2}
        whole = _ask(server, CHAT, wanted)["logprobs"]
        assert "".join(entry["token"] for entry in whole) == "You said: Hi"
        assert len(whole[0]["top_logprobs"]) == 2
        lines = _stream(server, CHAT, wanted)
        assert [entry for line in lines for entry in line.get("logprobs", [])] == whole


class TestModels:
    def test_the_list(self, server: Served) -> None:
        (entry,) = server.client.get("/api/tags").json()["models"]
        assert entry["name"] == entry["model"] == f"{MODEL_NAME}:latest"
        assert len(entry["digest"]) == 64
        assert entry["details"] == {
            "parent_model": "",
            "format": "onnx",
            "family": "qwen2",
            "families": ["qwen2"],
            "parameter_size": "0.00M",
            "quantization_level": "int4",
        }

    @pytest.mark.parametrize("name", [MODEL_NAME, f"{MODEL_NAME}:latest"])
    def test_names_with_and_without_the_tag(self, server: Served, name: str) -> None:
        assert _ask(server, CHAT, {"messages": HI, "model": name})["model"] == name
        for field in ("model", "name"):
            shown = server.client.post("/api/show", json={field: name}).json()
            assert shown["capabilities"] == ["completion", "tools", "thinking"]
            assert shown["model_info"]["qwen2.context_length"] == 4096

    def test_capabilities_are_the_templates(self, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}")
        monkeypatch.setitem(server.service.model.__dict__, "template", plain)
        shown = server.client.post("/api/show", json={"model": MODEL_NAME}).json()
        assert shown["capabilities"] == ["completion"]

    @pytest.mark.parametrize("name", ["llama3.2", f"{MODEL_NAME}:7b", "latest"])
    def test_another_model_is_404(self, server: Served, name: str) -> None:
        wanted = {"messages": HI, "prompt": "Hi"}
        for path in (CHAT, GENERATE, "/api/show"):
            response = server.client.post(path, json={**wanted, "model": name})
            assert MODEL_NAME in _error(response, 404)

    def test_versions(self, server: Served) -> None:
        version = server.client.get("/api/version").json()["version"]
        assert tuple(map(int, version.split("."))) >= (0, 6, 4)

    def test_a_probe_of_the_root_is_answered(self, server: Served) -> None:
        assert server.client.head("/").status_code == 200

    @pytest.mark.parametrize("verb", ["pull", "push", "create", "copy", "delete"])
    def test_models_cannot_be_changed(self, server: Served, verb: str) -> None:
        method = "DELETE" if verb == "delete" else "POST"
        assert "qwedge install" in _error(server.client.request(method, f"/api/{verb}", json={"model": "x"}), 400)


class TestEmbeddings:
    def test_texts_become_vectors_of_length_1(self, server: Served) -> None:
        body = server.client.post("/api/embed", json={"model": MODEL_NAME, "input": ["Hi", "Hello"]}).json()
        wanted = {"input": ["Hi", "Hello"], "model": MODEL_NAME}
        same = server.client.post("/v1/embeddings", json=wanted).json()["data"]
        assert body["embeddings"] == [entry["embedding"] for entry in same]
        assert body["prompt_eval_count"] == 7
        assert body["total_duration"] > 0
        old = server.client.post("/api/embeddings", json={"model": f"{MODEL_NAME}:latest", "prompt": "Hi"}).json()
        assert old == {"embedding": body["embeddings"][0]}

    def test_dimensions(self, server: Served) -> None:
        wanted = {"model": MODEL_NAME, "input": "Hi", "dimensions": 2}
        (vector,) = server.client.post("/api/embed", json=wanted).json()["embeddings"]
        assert len(vector) == 2
        assert sum(value * value for value in vector) == pytest.approx(1)

    def test_a_long_text_is_cut_off_unless_that_is_unwanted(self, serve: Serve) -> None:
        server = serve(FakeEngine(context_length=64))
        wanted = {"model": MODEL_NAME, "input": "x" * 100}
        assert server.client.post("/api/embed", json=wanted).json()["prompt_eval_count"] == 64
        _error(server.client.post("/api/embed", json={**wanted, "truncate": False}), 400)

    def test_nothing_to_read_is_refused(self, server: Served) -> None:
        for text in ("", [], ["a", ""], [1], None):
            _error(server.client.post("/api/embed", json={"model": MODEL_NAME, "input": text}), 400)


class TestLoading:
    @pytest.mark.parametrize(("path", "wanted"), [(CHAT, {"messages": []}), (CHAT, {}), (GENERATE, {"prompt": ""})])
    def test_nothing_to_answer_loads(self, server: Served, path: str, wanted: dict[str, Any]) -> None:
        body = _ask(server, path, {**wanted, "keep_alive": "5m"})
        assert (body["done"], body["done_reason"]) == (True, "load")
        assert body["message"]["content"] == "" if path == CHAT else body["response"] == ""

    def test_loading_wakes_a_sleeping_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edge.scheduler._REST_AFTER_S", 0.01)
        engine = FakeEngine()
        service = make_service(engine, sleep_after_s=0.3)
        with serving(service, ServerSettings(port=0)) as (host, port):
            client = httpx.Client(base_url=f"http://{host}:{port}", timeout=60)
            wait_for(lambda: service.stats().asleep)
            assert client.get("/api/ps").json() == {"models": []}
            assert client.post(GENERATE, json={"model": MODEL_NAME}).json()["done_reason"] == "load"
            assert len(client.get("/api/ps").json()["models"]) == 1
            client.close()
        assert engine.num_steps == 1

    def test_a_model_in_memory_is_listed(self, server: Served) -> None:
        (entry,) = server.client.get("/api/ps").json()["models"]
        assert (entry["model"], entry["context_length"]) == (f"{MODEL_NAME}:latest", 4096)

    def test_unloading_is_refused(self, server: Served) -> None:
        response = server.client.post(GENERATE, json={"model": MODEL_NAME, "keep_alive": 0})
        assert "sleep_after_s" in _error(response, 400)
        # Together with a prompt it is a wish for later, and harmless.
        assert _ask(server, GENERATE, {"prompt": "Hi", "keep_alive": 0})["done"]


class TestErrors:
    @pytest.mark.parametrize(
        "wanted",
        [
            {"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]},
            {"messages": [{"role": "robot", "content": "x"}]},
            {"messages": HI, "images": ["AAAA"]},
            {"messages": HI, "template": "{{ .Prompt }}"},
            {"messages": HI, "context": [1]},
            {"messages": HI, "format": "xml"},
            {"messages": HI, "options": {"mirostat": 1}},
            {"messages": HI, "options": {"repeat_last_n": 5}},
            {"messages": HI, "options": {"temperature": 9}},
            {"messages": HI, "options": {"num_predict": "3"}},
            {"messages": HI, "options": {"num_ctx": 3}},
            {"messages": HI, "tools": [{}]},
            {"messages": HI, "model": ""},
            {"messages": HI, "model": None},
            {"messages": HI, "think": "canary"},
        ],
    )
    def test_a_bad_request(self, server: Served, wanted: dict[str, Any]) -> None:
        message = _error(server.client.post(CHAT, json={"model": MODEL_NAME} | wanted), 400)
        assert "(hint: " in message
        assert "canary" not in message

    def test_a_context_that_the_request_made_too_small(self, server: Served) -> None:
        wanted = {"model": MODEL_NAME, "messages": HI, "options": {"num_ctx": 3}}
        message = _error(server.client.post(CHAT, json=wanted), 400)
        assert message.endswith("(hint: shorten the prompt, or send a larger num_ctx)")

    @pytest.mark.parametrize(
        "wanted",
        [{"raw": True, "logprobs": True}, {"suffix": "x"}, {"images": ["AAAA"]}, {"template": "x"}, {"context": [1]}],
    )
    def test_a_bad_request_for_a_generated_answer(self, server: Served, wanted: dict[str, Any]) -> None:
        # The fake model has no tokens for filling gaps.
        _error(server.client.post(GENERATE, json={"model": MODEL_NAME, "prompt": "Hi"} | wanted), 400)

    @pytest.mark.parametrize(
        ("method", "path", "status"), [("GET", CHAT, 405), ("POST", "/api/nope", 404), ("POST", CHAT, 400)]
    )
    def test_every_path_answers_in_ollamas_shape(self, server: Served, method: str, path: str, status: int) -> None:
        assert _error(server.client.request(method, path), status)

    def test_a_failure_in_mid_stream_is_the_last_line(self, serve: Serve) -> None:
        server = serve(FakeEngine(fail_after=3))
        _error(server.client.post(CHAT, json={"model": MODEL_NAME, "messages": HI, "stream": False}), 500)
        lines = _stream(server, CHAT, {"messages": HI})
        assert lines[0]["message"]["content"] == "Y"
        assert "engine failed" in lines[-1]["error"]

    def test_a_prompt_that_does_not_fit_is_refused_before_the_stream(self, serve: Serve) -> None:
        server = serve(FakeEngine(context_length=64))
        response = server.client.post(GENERATE, json={"model": MODEL_NAME, "prompt": "x" * 100})
        assert "64" in _error(response, 400)

    def test_malformed_bodies_get_no_5xx(self, serve: Serve) -> None:
        print(f"seed {SEED}")
        server = serve(FakeEngine(reply=lambda _: "ok", context_length=512))
        rng = random.Random(SEED)
        fields = ("model", "messages", "prompt", "tools", "options", "format", "think", "stream", "keep_alive", "raw")
        base = {"model": MODEL_NAME, "messages": HI, "prompt": "Hi", "options": {"num_predict": 2}}
        statuses = [
            (server.client.post(rng.choice((CHAT, GENERATE, "/api/show")), content=body).status_code, body)
            for body in odd_bodies(rng, 500, base, fields)
        ]
        assert [(status, body) for status, body in statuses if status >= 500] == []
        assert sum(status in {400, 404} for status, _ in statuses) > 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_answer(serve: Serve, stream: bool) -> None:
    server = serve(FakeEngine(reply=lambda _: "x" * 3000, step_s=0.002))
    body = json.dumps({"model": MODEL_NAME, "messages": HI, "stream": stream}).encode()
    with server.connect() as sock:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        sock.sendall(head + body)
        wait_for(lambda: server.engine.num_steps > 5)
    wait_for(lambda: server.service.stats().num_running == 0)
    assert server.engine.num_steps < 1000


def _ask(server: Served, path: str, wanted: dict[str, Any]) -> dict[str, Any]:
    response = server.client.post(path, json={"model": MODEL_NAME, "stream": False} | wanted)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return dict(response.json())


def _stream(server: Served, path: str, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    response = server.client.post(path, json={"model": MODEL_NAME, "stream": True} | wanted)
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.split("\n")[:-1]]


def _error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status
    error = response.json()["error"]
    assert isinstance(error, str)
    return error
