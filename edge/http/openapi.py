"""/openapi.json, with the bodies that FastAPI does not see because :mod:`edge.openai` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from edge import __version__
from edge.anthropic import CountRequest, MessagesRequest
from edge.ollama import ChatBody, GenerateBody, ShowBody
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
}


def describe(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI document of the application.

    FastAPI writes it, and does nothing else: serving with it would add a fifth to the time of a start.

    Args:
        routes: what is served; those that are not part of the API are left out.
    """
    from fastapi import FastAPI  # noqa: PLC0415 - see above

    app = FastAPI(title="qwedge", version=__version__)
    for route in routes:
        app.add_api_route(
            route.path,
            route.endpoint,
            methods=sorted((route.methods or set()) - {"HEAD"}),
            include_in_schema=route.include_in_schema,
            openapi_extra=_extra(route),
        )
    document = app.openapi()
    schemas = [(schema, "validation") for schema in _BODIES.values()]
    _, definitions = models_json_schema(schemas, ref_template=_REF)  # type: ignore[arg-type]
    document["components"] = {"schemas": definitions["$defs"]}
    return document


def _extra(route: Route) -> dict[str, Any]:
    """What FastAPI cannot read off an endpoint that takes the bare request."""
    names = route.param_convertors
    parameters = [{"in": "path", "name": name, "required": True, "schema": {"type": "string"}} for name in names]
    extra: dict[str, Any] = {"parameters": parameters} if parameters else {}
    return extra | _body_of(_BODIES[route.path]) if route.path in _BODIES else extra


def _body_of(schema: type[BaseModel]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REF.format(model=schema.__name__)}}}
    error = {"description": "The error object of the API that was asked"}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {"400": error, "404": error, "413": error, "429": error, "503": error},
    }
