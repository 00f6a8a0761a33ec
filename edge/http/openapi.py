"""/openapi.json, with the bodies that FastAPI does not see because :mod:`edge.openai` reads them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from edge.openai import ChatRequest, CompletionRequest

_REF = "#/components/schemas/{model}"


def body_of(schema: type[BaseModel]) -> dict[str, Any]:
    """The part of an operation that says what its body is."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=schema.__name__)}}}
    error = {"description": "OpenAI's error object"}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {"400": error, "404": error, "413": error, "429": error, "503": error},
    }


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the application, made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema(
            [(ChatRequest, "validation"), (CompletionRequest, "validation")], ref_template=_REF
        )
        document["components"] = {"schemas": definitions["$defs"]}
        for operation in (operation for path in document["paths"].values() for operation in path.values()):
            operation["responses"].pop("422", None)  # FastAPI's own validation, which never comes into play here
        app.openapi_schema = document
    return app.openapi_schema
