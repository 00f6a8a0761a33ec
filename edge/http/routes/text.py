"""What prompts are made of: ``/tokenize``, ``/detokenize`` and ``/apply-template``, under ``/v1`` as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge.http.caller import caller_of
from edge.model import Model
from edge.openai import parse_body, parse_chat
from edge.openai.text import apply_template, detokenize, parse_detokenize, parse_tokenize, tokenize
from edge.service import Service


def text_routes(service: Service) -> list[Route]:
    """The routes, each under two paths."""

    async def tokens(request: Request) -> Response:
        """The token ids of a text or a conversation."""
        return await _answer(request, lambda model, body: tokenize(model, parse_tokenize(body)))

    async def text(request: Request) -> Response:
        """The text of token ids."""
        return await _answer(request, lambda model, body: detokenize(model, parse_detokenize(body)))

    async def template(request: Request) -> Response:
        """The prompt that the body of a chat request becomes."""
        return await _answer(request, lambda model, body: apply_template(model, parse_chat(body)))

    async def _answer(request: Request, work: Callable[[Model, dict[str, Any]], dict[str, Any]]) -> Response:
        payload = await request.body()
        model = service.model
        caller_of(request).check_model(model.manifest.name)
        return JSONResponse(await run_in_threadpool(lambda: work(model, parse_body(payload))))

    paths = {"/tokenize": tokens, "/detokenize": text, "/apply-template": template}
    return [
        Route(prefix + path, endpoint, methods=["POST"]) for prefix in ("", "/v1") for path, endpoint in paths.items()
    ]
