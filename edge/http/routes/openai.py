"""OpenAI's API: ``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge.http.caller import answer_events
from edge.http.disconnect import unless_disconnected
from edge.http.event_stream import EventStream, comment, to_json
from edge.model import Model
from edge.openai import Answer, ChatRequest, CompletionRequest, parse_body, parse_chat, parse_completion, prepare
from edge.openai.grammar import asks_for_form
from edge.service import Event, Failed, GenerationRequest, Service

log = logging.getLogger(__name__)

SHORT_BODY: Final = 2048
"""Bytes of a body that is read on the event loop."""

Parse = Callable[[Mapping[str, Any]], ChatRequest | CompletionRequest]
Read = tuple[ChatRequest | CompletionRequest, Sequence[GenerationRequest]]


def openai_routes(service: Service) -> list[Route]:
    """The routes of the API."""

    async def chat_completions(request: Request) -> Response:
        """The model's next message in a conversation, streamed with ``"stream": true``."""
        return await _generate(service, parse_chat, request)

    async def completions(request: Request) -> Response:
        """The continuation of a text, streamed with ``"stream": true``."""
        return await _generate(service, parse_completion, request)

    return [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
    ]


async def _generate(service: Service, parse: Parse, request: Request) -> Response:
    model, payload = service.model, await request.body()
    read = _read_at_once(model, parse, payload)
    wanted, generations = read if read is not None else await run_in_threadpool(_read, model, parse, payload)
    answer = Answer(model, wanted, generations)
    stream = answer_events(request, service, generations, wanted.model)
    if wanted.stream:
        first = await anext(stream)  # a refusal is raised here, while the status can still say so
        return EventStream(_server_sent(answer, first, stream))
    body = await unless_disconnected(request.receive, _complete(answer, stream))
    return JSONResponse(body)


def _read_at_once(model: Model, parse: Parse, payload: bytes) -> Read | None:
    """A request that takes less time than handing it to a thread: short, in no form, without an adapter; else None."""
    if len(payload) > SHORT_BODY:
        return None
    request = parse(parse_body(payload))
    if asks_for_form(request) or request.model not in {None, model.manifest.name}:
        return None
    return request, prepare(model, request)


def _read(model: Model, parse: Parse, payload: bytes) -> Read:
    request = parse(parse_body(payload))
    return request, prepare(model, request)


async def _complete(answer: Answer, stream: AsyncGenerator[tuple[int, Event], None]) -> dict[str, Any]:
    async with aclosing(stream):
        async for index, event in stream:
            answer.chunks(index, event)
    return answer.body()


async def _server_sent(
    answer: Answer, first: tuple[int, Event], rest: AsyncGenerator[tuple[int, Event], None]
) -> AsyncGenerator[bytes, None]:
    """The events of an answer as server-sent events; ``[DONE]`` is the last one whatever happens.

    The place in the queue is a comment, which clients that do not know it skip.
    """
    async with aclosing(rest):
        yield comment(first[1])
        async for index, event in rest:
            yield comment(event)
            for chunk in answer.chunks(index, event):
                yield b"data: %s\n\n" % to_json(chunk)
            if isinstance(event, Failed):
                log.info("%s ended in mid-stream: %s", answer.id, event.error.code)
    yield b"data: [DONE]\n\n"
