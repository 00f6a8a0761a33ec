"""The HTTP surface as an ASGI application: OpenAI's API, health, metrics and the page.

Bodies are read as bytes and checked by :mod:`edge.openai`, not by a framework: FastAPI's own handling answers NaN and
lone surrogates with 500 and echoes what was sent. Parsing, templating and tokenizing run in a worker thread, so that a
long prompt does not hold up the streams of others. docs/http-api.md describes the API for its users.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from edge import __version__
from edge.errors import CancelledError, QwedgeError, RequestError
from edge.http import openapi
from edge.http.disconnect import unless_disconnected
from edge.http.guard import Guard, error_response
from edge.metrics import CONTENT_TYPE
from edge.model import Model
from edge.openai import Answer, ChatRequest, CompletionRequest, parse_body, parse_chat, parse_completion, prepare
from edge.service import Event, Failed, GenerationRequest, Queued, Service, events
from edge.settings.server import ServerSettings

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
STALLED_AFTER_S = 30.0
"""Seconds without a finished engine step, while there is work, after which the server calls itself stalled."""

Parse = Callable[[Mapping[str, Any]], ChatRequest | CompletionRequest]


def create_app(
    service: Service, settings: ServerSettings, *, problem: Callable[[], str | None] = lambda: None
) -> Starlette:
    """The application; it starts and stops nothing.

    Args:
        service: takes the requests; whoever made it starts and stops it.
        settings: limits and allowed hosts.
        problem: tells what else does not work as it should, for ``/health``; None where all is well.
    """
    routes = [*_generation(service), *_information(service, problem)]
    return Starlette(
        routes=[*routes, _document(routes), Mount("/static", StaticFiles(directory=STATIC), name="static")],
        middleware=[Middleware(Guard, settings=settings)],
        exception_handlers=dict.fromkeys((QwedgeError, HTTPException, ClientDisconnect), _answer_error),
    )


def _generation(service: Service) -> list[Route]:
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


def _information(service: Service, problem: Callable[[], str | None]) -> list[Route]:
    async def list_models(_request: Request) -> Response:
        """The served model, by itself and with each adapter."""
        names = await run_in_threadpool(service.model.names)
        return JSONResponse({"object": "list", "data": [_describe_model(service.model, name) for name in names]})

    async def get_model(request: Request) -> Response:
        """The served model, or the model with an adapter; 404 for another name."""
        name = request.path_params["name"]
        await run_in_threadpool(service.model.find_adapter, name)
        return JSONResponse(_describe_model(service.model, name))

    async def health(_request: Request) -> Response:
        """Whether the server makes progress: 200 with status ok or degraded, or 503 with draining or stalled."""
        body = _health(service, problem())
        return JSONResponse(body, 200 if body["status"] in {"ok", "degraded"} else 503)

    async def metrics(_request: Request) -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.render(service.stats()), media_type=CONTENT_TYPE)

    async def page(_request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{name}", get_model),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/", page, include_in_schema=False),
    ]


def _document(routes: Sequence[Route]) -> Route:
    document = cache(lambda: openapi.describe(routes))

    async def describe(_request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(document))

    return Route("/openapi.json", describe, include_in_schema=False)


async def _generate(service: Service, parse: Parse, request: Request) -> Response:
    payload = await request.body()
    wanted, generations = await run_in_threadpool(_read, service.model, parse, payload)
    answer = Answer(service.model, wanted, generations)
    if wanted.stream:
        stream = events(service, generations)
        first = await anext(stream)  # a refusal is raised here, while the status can still say so
        return EventStream(_server_sent(answer, first, stream))
    body = await unless_disconnected(request.receive, _complete(service, answer, generations))
    return JSONResponse(body)


def _read(
    model: Model, parse: Parse, payload: bytes
) -> tuple[ChatRequest | CompletionRequest, Sequence[GenerationRequest]]:
    request = parse(parse_body(payload))
    return request, prepare(model, request)


async def _complete(service: Service, answer: Answer, generations: Sequence[GenerationRequest]) -> dict[str, Any]:
    async with aclosing(events(service, generations)) as stream:
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
        yield _comment(first[1])
        async for index, event in rest:
            yield _comment(event)
            for chunk in answer.chunks(index, event):
                yield b"data: %s\n\n" % _to_json(chunk)
            if isinstance(event, Failed):
                log.info("%s ended in mid-stream: %s", answer.id, event.error.code)
    yield b"data: [DONE]\n\n"


def _comment(event: Event) -> bytes:
    if not isinstance(event, Queued):
        return b""
    return f": queued position={event.position} eta_s={event.eta_s:.1f}\n\n".encode()


def _to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class EventStream(Response):
    """A stream of server-sent events that stops its source when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        del scope
        with suppress(CancelledError):
            async with aclosing(self._lines):
                await unless_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines:
            if line:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _describe_model(model: Model, name: str) -> dict[str, Any]:
    manifest = model.manifest
    return {
        "id": name,
        "object": "model",
        "created": int(model.loaded_at),
        "owned_by": "qwedge",
        "context_length": model.context_length,
        "parameter_count": manifest.parameter_count,
        "version": manifest.version,
    }


def _health(service: Service, problem: str | None) -> dict[str, Any]:
    stats = service.stats()
    status = "ok" if problem is None else "degraded"
    if not stats.accepting:
        status = "draining"
    elif stats.seconds_since_progress > STALLED_AFTER_S:
        status = "stalled"
    return {
        "status": status,
        **({} if problem is None else {"problem": problem}),
        "model": service.model.manifest.name,
        "version": __version__,
        "queue": {
            "waiting": stats.num_waiting,
            "running": stats.num_running,
            "slots": stats.slots,
            "max_waiting": stats.max_queue,
        },
        "asleep": stats.asleep,
        "seconds_since_progress": round(stats.seconds_since_progress, 3),
    }


async def _answer_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, QwedgeError):
        return error_response(error)
    if isinstance(error, HTTPException):
        return error_response(_routing_error(error), error.headers)
    assert isinstance(error, ClientDisconnect)
    return error_response(CancelledError("the client went away"))


def _routing_error(error: HTTPException) -> RequestError:
    """Starlette's 404 and 405 in the error tree."""
    result = RequestError(error.detail.lower(), hint="see /openapi.json for what this server answers")
    result.status = error.status_code
    result.code = error.detail.lower().replace(" ", "_")
    return result
