"""Anthropic's API: ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge.anthropic import MessagesRequest, MessageWriter, parse_count, parse_messages, to_chat
from edge.http.answering import NAMED_EVENTS, respond
from edge.http.caller import answer_events
from edge.model import Model
from edge.openai import parse_body, prepare
from edge.service import GenerationRequest, Service


def anthropic_routes(service: Service) -> list[Route]:
    """The routes of the API."""

    async def messages(request: Request) -> Response:
        """The model's next message in a conversation, streamed with ``"stream": true``."""
        wanted, generation, writer = await run_in_threadpool(_read, service.model, await request.body())
        stream = answer_events(request, service, [generation], wanted.model)
        return await respond(request, writer, stream, NAMED_EVENTS if wanted.stream else None)

    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of such a request has."""
        count = await run_in_threadpool(_count, service.model, await request.body())
        return JSONResponse({"input_tokens": count})

    return [
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


def _read(model: Model, payload: bytes) -> tuple[MessagesRequest, GenerationRequest, MessageWriter]:
    request = parse_messages(parse_body(payload))
    chat = to_chat(request)
    (generation,) = prepare(model, chat)
    return request, generation, MessageWriter(model, request, chat, generation)


def _count(model: Model, payload: bytes) -> int:
    (generation,) = prepare(model, to_chat(parse_count(parse_body(payload))))
    return len(generation.prompt_ids)
