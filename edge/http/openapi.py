"""/openapi.json, with the bodies and answers that FastAPI does not see because :mod:`edge.openai` deals with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.routing import Route

from edge import __version__
from edge.anthropic import CountRequest, MessagesRequest
from edge.http.routes.evaluation import EvaluationRequest
from edge.ollama import ChatBody, EmbedBody, EmbeddingsBody, GenerateBody, ShowBody
from edge.openai import ChatRequest, CompletionRequest
from edge.openai.embeddings import EmbeddingRequest
from edge.openai.responses import ResponseRequest
from edge.openai.text import DetokenizeRequest, TokenizeRequest

_REF = "#/components/schemas/{model}"
_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/apply-template": ChatRequest,
    "/v1/tokenize": TokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
    "/v1/apply-template": ChatRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/api/chat": ChatBody,
    "/api/generate": GenerateBody,
    "/api/show": ShowBody,
    "/v1/mqtt/try": ChatRequest,
    "/v1/evaluations": EvaluationRequest,
    "/api/embed": EmbedBody,
    "/api/embeddings": EmbeddingsBody,
}

_ANSWERS: dict[str, str] = {
    "/v1/chat/completions": "ChatCompletion",
    "/v1/completions": "TextCompletion",
    "/v1/responses": "ResponseBody",
    "/v1/embeddings": "EmbeddingList",
    "/tokenize": "TokenList",
    "/detokenize": "Text",
    "/apply-template": "Prompt",
    "/v1/tokenize": "TokenList",
    "/v1/detokenize": "Text",
    "/v1/apply-template": "Prompt",
    "/v1/messages": "AnthropicMessage",
    "/v1/messages/count_tokens": "TokenCount",
    "/api/chat": "OllamaChat",
    "/api/generate": "OllamaAnswer",
    "/api/embed": "OllamaVectors",
    "/api/embeddings": "OllamaVector",
}
"""Path -> class of :mod:`edge.http.answer_schemas` or :mod:`edge.http.other_answers`, needed by this document only."""
_ERRORS = {"/v1/messages": "AnthropicError", "/api/": "OllamaError", "/": "ErrorBody"}
"""Beginning of a path -> class of its errors, the first that fits."""
_STRING = {"type": "string"}
_QUERIES: dict[str, tuple[str, ...]] = {
    "/v1/logs": ("after", "level"),
    "/v1/evaluations/{id}": ("compare",),
}
"""Path -> what may stand after the question mark of a GET."""
_EVENTS, _LINES = "text/event-stream", "application/x-ndjson"
_STREAMED = {
    "/v1/chat/completions": _EVENTS,
    "/v1/completions": _EVENTS,
    "/v1/responses": _EVENTS,
    "/v1/messages": _EVENTS,
    "/api/chat": _LINES,
    "/api/generate": _LINES,
}
_REFUSALS = (400, 401, 403, 404, 413, 429, 500, 503)


def describe(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI document of the application.

    FastAPI writes it, and does nothing else: serving with it would add a fifth to the time of a start.

    Args:
        routes: what is served; those that are not part of the API are left out.
    """
    from fastapi import FastAPI  # noqa: PLC0415 - see above

    references, definitions = _components()
    app = FastAPI(title="qwedge", version=__version__)
    for route in routes:
        app.add_api_route(
            route.path,
            route.endpoint,
            methods=sorted((route.methods or set()) - {"HEAD"}),
            include_in_schema=route.include_in_schema,
            openapi_extra=_extra(route, references),
        )
    document = app.openapi()
    document["components"] = {"schemas": definitions}
    return document


def _components() -> tuple[Mapping[str, dict[str, Any]], dict[str, Any]]:
    """Path -> reference to the schema of its body, ``PATH answer``, ``PATH error`` -> of those; and all schemas."""
    from edge.http import answer_schemas, other_answers  # noqa: PLC0415 - see above

    schemas = {**vars(answer_schemas), **vars(other_answers)}
    models: dict[str, type[BaseModel]] = dict(_BODIES)
    models |= {f"{path} answer": schemas[name] for path, name in _ANSWERS.items()}
    models |= {f"{path} error": schemas[_error_of(path)] for path in _BODIES}
    keys: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in models.values()]
    # References, not names: classes of different modules may have the same one.
    references, definitions = models_json_schema(list(dict.fromkeys(keys)), ref_template=_REF)
    return {name: references[model, "validation"] for name, model in models.items()}, definitions["$defs"]


def _extra(route: Route, references: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What FastAPI cannot read off an endpoint that takes the bare request."""
    names = route.param_convertors
    parameters: list[dict[str, Any]] = [
        {"in": "path", "name": name, "required": True, "schema": _STRING} for name in names
    ]
    methods = route.methods or set()
    if "GET" in methods:
        queries = _QUERIES.get(route.path, ())
        parameters += [{"in": "query", "name": name, "required": False, "schema": _STRING} for name in queries]
    extra: dict[str, Any] = {"parameters": parameters} if parameters else {}
    if route.path in _BODIES and "POST" in methods:
        extra["requestBody"] = {"required": True, "content": _json(references[route.path])}
        content = _json(references[f"{route.path} error"])
        refusal = {"description": "The error object of the API that was asked", "content": content}
        extra["responses"] = {str(status): refusal for status in _REFUSALS}
    if route.path in _ANSWERS:
        content = _json(references[f"{route.path} answer"])
        if route.path in _STREAMED:
            content[_STREAMED[route.path]] = {"schema": {"type": "string"}}
        extra["responses"]["200"] = {"description": "The answer", "content": content}
    return extra


def _error_of(path: str) -> str:
    return next(name for beginning, name in _ERRORS.items() if path.startswith(beginning))


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
