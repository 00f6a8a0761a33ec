"""The OpenAPI document tells what is served: every route, the fields of bodies, and what answers look like."""

from collections.abc import Iterator
from typing import Any

import fastjsonschema
import pytest

from tests.fakes import MODEL_NAME, FakeEngine
from tests.serving import Served

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}
ANTHROPIC = {**CHAT, "max_tokens": 200}
OLLAMA = {**CHAT, "model": MODEL_NAME, "stream": False}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, **TOOLS, "logprobs": True, "top_logprobs": 2, "n": 2}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/completions", {"prompt": ["Hi", "Ho"], "echo": True, "logprobs": 2, "max_tokens": 2}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 2, "instructions": "x", "reasoning": {"effort": "low"}}),
    ("/v1/responses", {"input": "Hi", "tools": [{"type": "function", "name": "f"}], "top_logprobs": 1}),
    ("/v1/embeddings", {"input": ["Hi", "Ho"]}),
    ("/v1/embeddings", {"input": "Hi", "encoding_format": "base64"}),
    ("/tokenize", {"content": "ü"}),
    ("/v1/tokenize", {"content": "ü", "with_pieces": True, "return_token_strs": True}),
    ("/detokenize", {"tokens": [72]}),
    ("/apply-template", CHAT),
    ("/v1/messages", ANTHROPIC),
    ("/v1/messages", {**ANTHROPIC, "tools": [{"name": "f", "input_schema": {}}], "thinking": {"type": "adaptive"}}),
    ("/v1/messages/count_tokens", CHAT),
    ("/api/chat", {**OLLAMA, **TOOLS, "logprobs": True}),
    ("/api/chat", {"model": MODEL_NAME, "stream": False}),
    ("/api/generate", {"model": MODEL_NAME, "prompt": "Hi", "stream": False}),
    ("/api/embed", {"model": MODEL_NAME, "input": ["Hi", "Ho"]}),
    ("/api/embeddings", {"model": MODEL_NAME, "prompt": "Hi"}),
]


@pytest.fixture
def document(server: Served) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/openapi.json").json()
    return found


def test_every_route_of_the_api_is_there(server: Served, document: dict[str, Any]) -> None:
    assert {path for path, _ in REQUESTS} <= document["paths"].keys()
    assert "/openapi.json" not in document["paths"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            # Method not allowed and not found are what no described route answers.
            status = server.client.request(method.upper(), path.replace("{name}", "x")).status_code
            assert status not in {405, 500, 501}, (method, path)
            assert operation["responses"], path


def test_a_body_is_described_by_its_fields(document: dict[str, Any]) -> None:
    described = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    schema = document["components"]["schemas"][described["schema"]["$ref"].rsplit("/", 1)[-1]]
    assert {"messages", "temperature", "stream", "tools"} <= schema["properties"].keys()


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = list(_references(document))
    assert len(references) > 50
    for reference in references:
        assert reference.rsplit("/", 1)[-1] in document["components"]["schemas"]


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_bodies_and_answers_are_what_it_says(serve: Any, path: str, body: dict[str, Any]) -> None:
    server = serve(FakeEngine(reply=lambda _: f"<think>\nhm\n</think>\n\nHello. {CALL}"))
    document = server.client.get("/openapi.json").json()
    operation = document["paths"][path]["post"]
    _validator(document, operation["requestBody"])(body)
    response = server.client.post(path, json=body)
    assert response.status_code == 200
    _validator(document, operation["responses"]["200"])(response.json())
    refused = server.client.post(path, json={**body, "model": "another"})
    _validator(document, operation["responses"][str(refused.status_code)])(refused.json())
    assert refused.status_code == 404


def _validator(document: dict[str, Any], described: dict[str, Any]) -> Any:
    schema = described["content"]["application/json"]["schema"]
    return fastjsonschema.compile({**schema, "components": document["components"]}, use_default=False)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _references(child)
