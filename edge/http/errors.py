"""Errors as responses, in the shape of the API that was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Scope

import edge.anthropic
import edge.ollama
import edge.openai
from edge.errors import QwedgeError


def error_response(error: QwedgeError, scope: Scope, extra_headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that failed, with ``Retry-After`` where a later try may succeed."""
    headers = dict(extra_headers or {})
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return JSONResponse(error_body(error, scope), error.status, headers)


def error_body(error: QwedgeError, scope: Scope) -> dict[str, Any]:
    """Anthropic's shape under its paths and for its clients, Ollama's under ``/api/``, else OpenAI's."""
    path = scope["path"]
    if path.startswith("/v1/messages") or "anthropic-version" in Headers(scope=scope):
        return edge.anthropic.error_body(error)
    if path.startswith("/api/"):
        return edge.ollama.error_body(error)
    return edge.openai.error_body(error)
