"""Ollama's API, under ``/api``."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge import __version__
from edge.errors import RequestError
from edge.http.caller import answer_events, caller_of
from edge.http.disconnect import unless_disconnected
from edge.http.event_stream import LineStream, to_json
from edge.model import Model
from edge.ollama import (
    ChatBody,
    GenerateBody,
    LineWriter,
    ShowBody,
    describe_entry,
    describe_loaded,
    describe_model,
    generation_of,
    loaded,
    parse,
    served_name,
    to_openai,
)
from edge.openai import parse_body
from edge.service import Event, Failed, GenerationRequest, Service

log = logging.getLogger(__name__)

API_VERSION: Final = "0.13.0"
"""The version of Ollama whose API this is: clients refuse to talk to older ones than they know."""
_STORE: Final = ("pull", "push", "create", "copy", "delete")

Body = type[ChatBody] | type[GenerateBody]


def ollama_routes(service: Service) -> list[Route]:
    """The routes of the API."""

    async def chat(request: Request) -> Response:
        """The model's next message in a conversation, streamed unless ``"stream": false``."""
        return await _generate(service, ChatBody, request)

    async def generate(request: Request) -> Response:
        """The answer to a prompt, streamed unless ``"stream": false``."""
        return await _generate(service, GenerateBody, request)

    async def tags(request: Request) -> Response:
        """The served model, by itself and with each adapter."""
        names = await run_in_threadpool(service.model.names)
        may_use = caller_of(request).may_use
        return JSONResponse({"models": [describe_entry(service.model, name) for name in names if may_use(name)]})

    async def show(request: Request) -> Response:
        """What a model is and can do."""
        return JSONResponse(await run_in_threadpool(_show, service.model, await request.body()))

    async def running(_request: Request) -> Response:
        """The model, where it is in memory."""
        model = service.model
        entries = [] if service.stats().asleep else [describe_loaded(model, model.manifest.name)]
        return JSONResponse({"models": entries})

    async def version(_request: Request) -> Response:
        """The version of Ollama whose API this is, and qwedge's own."""
        return JSONResponse({"version": API_VERSION, "qwedge": __version__})

    async def store(_request: Request) -> Response:
        hint = "whoever runs the device does so: see qwedge install"
        raise RequestError("models are not installed, changed or removed through this API", hint=hint)

    return [
        Route("/api/chat", chat, methods=["POST"]),
        Route("/api/generate", generate, methods=["POST"]),
        Route("/api/tags", tags),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/ps", running),
        Route("/api/version", version),
        *(Route(f"/api/{verb}", store, methods=["POST", "DELETE"], include_in_schema=False) for verb in _STORE),
    ]


async def _generate(service: Service, schema: Body, request: Request) -> Response:
    body = await run_in_threadpool(_parse, service.model, schema, await request.body())
    if body.is_empty:
        return JSONResponse(await _load(service, request, body))
    writer, generation = await run_in_threadpool(_prepare, service.model, body)
    stream = answer_events(request, service, [generation], served_name(body.model))
    if body.streams:
        first = await anext(stream)  # a refusal is raised here, while the status can still say so
        return LineStream(_lines(writer, first, stream))
    return JSONResponse(await unless_disconnected(request.receive, _complete(writer, stream)))


def _parse(model: Model, schema: Body, payload: bytes) -> ChatBody | GenerateBody:
    body = parse(schema, parse_body(payload))
    model.find_adapter(served_name(body.model))
    return body


def _prepare(model: Model, body: ChatBody | GenerateBody) -> tuple[LineWriter, GenerationRequest]:
    wanted = to_openai(model, body)
    generation = generation_of(model, wanted, body.given_options)
    return LineWriter(model, body, wanted, generation), generation


async def _load(service: Service, request: Request, body: ChatBody | GenerateBody) -> dict[str, Any]:
    """Bring a model that sleeps back into memory, by letting it read one token."""
    if service.stats().asleep:
        model = service.model
        generation = GenerationRequest((min(model.eos_ids),), model.sampling({}), max_tokens=0)
        await _events_of(answer_events(request, service, [generation], served_name(body.model)))
    return loaded(body)


async def _events_of(stream: AsyncGenerator[tuple[int, Event], None]) -> Sequence[Event]:
    """All events.

    Raises:
        QwedgeError: the request failed.
    """
    async with aclosing(stream):
        told = [event async for _, event in stream]
    for event in told:
        if isinstance(event, Failed):
            raise event.error
    return told


async def _complete(writer: LineWriter, stream: AsyncGenerator[tuple[int, Event], None]) -> dict[str, Any]:
    async with aclosing(stream):
        async for _, event in stream:
            for _told in writer.lines(event):
                pass  # the answer grows with what a stream would tell
    return writer.body()


async def _lines(
    writer: LineWriter, first: tuple[int, Event], rest: AsyncGenerator[tuple[int, Event], None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield _tell(writer, first[1])
        async for _, event in rest:
            yield _tell(writer, event)
            if isinstance(event, Failed):
                log.info("an answer ended in mid-stream: %s", event.error.code)


def _tell(writer: LineWriter, event: Event) -> bytes:
    return b"".join(to_json(line) + b"\n" for line in writer.lines(event))


def _show(model: Model, payload: bytes) -> dict[str, Any]:
    body = parse(ShowBody, parse_body(payload))
    model.find_adapter(served_name(body.model))
    return describe_model(model)
