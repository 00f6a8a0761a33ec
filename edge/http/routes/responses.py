"""OpenAI's responses: ``/v1/responses``."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge.http.caller import answer_events
from edge.http.disconnect import unless_disconnected
from edge.http.event_stream import EventStream, comment, named_event
from edge.model import Model
from edge.openai import parse_body, prepare
from edge.openai.responses import ResponseRequest, ResponseWriter, own_names, parse_response, to_chat
from edge.service import Event, Failed, GenerationRequest, Service

log = logging.getLogger(__name__)


def response_routes(service: Service) -> list[Route]:
    """The routes of the API."""

    async def responses(request: Request) -> Response:
        """The model's next turn, streamed with ``"stream": true``; nothing is stored."""
        wanted, generation, writer = await run_in_threadpool(_read, service.model, await request.body())
        stream = answer_events(request, service, [generation], wanted.model)
        with own_names():
            if wanted.stream:
                first = await anext(stream)  # a refusal is raised here, while the status can still say so
                return EventStream(_server_sent(writer, first, stream))
            return JSONResponse(await unless_disconnected(request.receive, _complete(writer, stream)))

    return [Route("/v1/responses", responses, methods=["POST"])]


def _read(model: Model, payload: bytes) -> tuple[ResponseRequest, GenerationRequest, ResponseWriter]:
    request = parse_response(parse_body(payload))
    chat = to_chat(request)
    with own_names():
        (generation,) = prepare(model, chat)
    return request, generation, ResponseWriter(model, request, chat, generation)


async def _complete(writer: ResponseWriter, stream: AsyncGenerator[tuple[int, Event], None]) -> dict[str, Any]:
    async with aclosing(stream):
        async for _, event in stream:
            for _told in writer.events(event):
                pass  # the response grows with what a stream would tell
    return writer.body()


async def _server_sent(
    writer: ResponseWriter, first: tuple[int, Event], rest: AsyncGenerator[tuple[int, Event], None]
) -> AsyncGenerator[bytes, None]:
    """The events of a response as server-sent events; the last one is the terminal one, whatever happens."""
    async with aclosing(rest):
        yield _tell(writer, first[1])
        async for _, event in rest:
            yield _tell(writer, event)
            if isinstance(event, Failed):
                log.info("%s ended in mid-stream: %s", writer.id, event.error.code)


def _tell(writer: ResponseWriter, event: Event) -> bytes:
    return comment(event) + b"".join(map(named_event, writer.events(event)))
