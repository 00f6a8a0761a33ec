"""Requests that are none, or hardly, to everything the server takes: none may get a 5xx.

::

    python -m tests.faults.malformed_http --requests 20000 --seed 7

The routes and their fields come from the server's own OpenAPI document. Prints figures as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil

from edge.settings.server import ServerSettings
from tests.edge.http.malformed import odd_bodies
from tests.fakes import MODEL_NAME, FakeEngine
from tests.serving import Served, served

_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "done"},
    {"role": "user", "content": "And now?"},
]
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"]}
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}]
_ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": "done"},
]
_BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "done"}]},
]
_FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}
SOUND: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": _MESSAGES, "max_tokens": 2, "tools": _TOOLS, "tool_choice": "auto"},
        {"messages": _MESSAGES[:2], "max_tokens": 2, "response_format": _FORM, "stream": True},
        {"messages": _MESSAGES[:2], "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "n": 2, "stop": ["x"]},
    ],
    "/v1/completions": [{"prompt": ["Hi", [72]], "max_tokens": 2, "logprobs": 1, "echo": True, "logit_bias": {"1": 1}}],
    "/v1/responses": [
        {"input": "Hi", "max_output_tokens": 2, "text": {"format": {"type": "json_schema", "schema": _SCHEMA}}},
        {"input": _ITEMS, "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}], "stream": True},
    ],
    "/v1/embeddings": [{"input": ["Hi", [72]], "dimensions": 2, "encoding_format": "base64"}],
    "/v1/messages": [{"messages": _BLOCKS, "max_tokens": 2, "tools": [{"name": "f", "input_schema": _SCHEMA}]}],
    "/v1/messages/count_tokens": [{"messages": _BLOCKS}],
    "/api/chat": [
        {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": "Hi"}],
            "options": {"num_predict": 2},
            "stream": False,
        }
    ],
    "/api/generate": [{"model": MODEL_NAME, "prompt": "Hi", "options": {"num_predict": 2}, "format": _SCHEMA}],
    "/tokenize": [{"content": "Hi"}, {"messages": _MESSAGES}],
    "/detokenize": [{"tokens": [72, 105]}],
    "/apply-template": [{"messages": _MESSAGES, "tools": _TOOLS}],
}
"""Path -> bodies that are answered, from which the others are made; other paths begin with an empty one."""
_HEADERS: tuple[dict[str, Any], ...] = (
    {},
    {"content-type": "application/json"},
    {"content-type": "application/json; charset=utf-16"},
    {"content-type": "text/plain"},
    {"content-type": "multipart/form-data; boundary=x"},
    {"content-encoding": "gzip"},
    {"accept": "application/xml"},
    {"accept-encoding": "br;q=nan"},
    {"authorization": b"Bearer \xff"},
    {"x-request-id": b"\xff"},
)


def campaign(count: int, seed: int) -> dict[str, Any]:
    """Send malformed requests to every route that takes a POST.

    Returns:
        How many requests there were by status, those that failed on our side (``failures``), those that were refused in
        no known shape (``shapeless``), and what the process holds more after the second half of them (MB).
    """
    rng = random.Random(seed)
    settings = ServerSettings(port=0)
    with served(FakeEngine(reply=lambda _: "ok", context_length=512), max_queue=16, settings=settings) as server:
        outcome = _send(server, list(_requests(server, rng, count)), rng)
        assert server.client.get("/health").json()["status"] == "ok"
    return outcome


def _requests(server: Served, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    fields = {path: names or ["messages", "input", "name"] for path, names in posted_fields(server.client).items()}
    paths = sorted(fields)
    for number in range(count):
        path = paths[number % len(paths)]
        base = rng.choice(SOUND.get(path) or SOUND.get(path.removeprefix("/v1")) or [{}])
        yield path, next(odd_bodies(rng, 1, base, fields[path]))


def posted_fields(client: httpx.Client) -> dict[str, list[str]]:
    """Every path that takes a POST, and the fields of its body as the OpenAPI document tells them."""
    document = client.get("/openapi.json").json()
    found = {}
    for path, methods in document["paths"].items():
        if "post" in methods and "{" not in path:
            content = methods["post"].get("requestBody", {}).get("content", {}).get("application/json", {})
            name = content.get("schema", {}).get("$ref", "").rsplit("/", 1)[-1]
            found[path] = sorted(document["components"]["schemas"].get(name, {}).get("properties", {}))
    return found


def _send(server: Served, requests: list[tuple[str, bytes]], rng: random.Random) -> dict[str, Any]:
    process = psutil.Process()
    statuses: Counter[int] = Counter()
    failures, shapeless, half_way = [], [], 0
    began = time.monotonic()
    for number, (path, body) in enumerate(requests):
        response = server.client.post(path, content=body, headers=rng.choice(_HEADERS))
        statuses[response.status_code] += 1
        if response.status_code >= 500:
            failures.append((path, body))
        elif response.status_code >= 400 and not _has_shape(response):
            shapeless.append((path, body))
        if number == len(requests) // 2:
            half_way = process.memory_info().rss
    return {
        "requests": len(requests),
        "statuses": dict(sorted(statuses.items())),
        "failures": failures,
        "shapeless": shapeless,
        "more_mb": round((process.memory_info().rss - half_way) / 1e6, 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def _has_shape(response: httpx.Response) -> bool:
    """Whether a refusal says what is wrong: OpenAI's and Anthropic's as an object, Ollama's as a text."""
    error = response.json().get("error")
    return bool(error["message"] if isinstance(error, dict) else error)


def main() -> None:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    figures = campaign(options.requests, options.seed)
    told = {**figures, "failures": len(figures["failures"]), "shapeless": len(figures["shapeless"])}
    print(json.dumps({"seed": options.seed, **told}))
    for kind in ("failures", "shapeless"):
        for path, body in figures[kind][:10]:
            print(kind, path, body[:300])
    raise SystemExit(1 if figures["failures"] or figures["shapeless"] else 0)


if __name__ == "__main__":
    main()
