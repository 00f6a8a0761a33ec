"""Anthropic's API: ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge.anthropic import MessagesRequest, MessageWriter, parse_count, parse_messages, to_chat
from edge.http.caller import answer_events
from edge.http.disconnect import unless_disconnected
from edge.http.event_stream import EventStream, comment, named_event
from edge.model import Model
from edge.openai import parse_body, prepare
from edge.service import Event, Failed, GenerationRequest, Service

log = logging.getLogger(__name__)


def anthropic_routes(service: Service) -> list[Route]:
    """The routes of the API."""

    async def messages(request: Request) -> Response:
        """The model's next message in a conversation, streamed with ``"stream": true``."""
        wanted, generation, writer = await run_in_threadpool(_read, service.model, await request.body())
        stream = answer_events(request, service, [generation], wanted.model)
        if wanted.stream:
            first = await anext(stream)  # a refusal is raised here, while the status can still say so
            return EventStream(_server_sent(writer, first, stream))
        return JSONResponse(await unless_disconnected(request.receive, _complete(writer, stream)))

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


async def _complete(writer: MessageWriter, stream: AsyncGenerator[tuple[int, Event], None]) -> dict[str, Any]:
    async with aclosing(stream):
        async for _, event in stream:
            for _told in writer.events(event):
                pass  # the message grows with what a stream would tell
    return writer.body()


async def _server_sent(
    writer: MessageWriter, first: tuple[int, Event], rest: AsyncGenerator[tuple[int, Event], None]
) -> AsyncGenerator[bytes, None]:
    """The events of a message as server-sent events; the place in the queue is a comment, which clients skip."""
    async with aclosing(rest):
        yield _tell(writer, first[1])
        async for _, event in rest:
            yield _tell(writer, event)
            if isinstance(event, Failed):
                log.info("%s ended in mid-stream: %s", writer.id, event.error.code)


def _tell(writer: MessageWriter, event: Event) -> bytes:
    return comment(event) + b"".join(map(named_event, writer.events(event)))
