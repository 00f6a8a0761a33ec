"""The HTTP surface as an ASGI application: the APIs, health, metrics and the page.

Bodies are read as bytes and checked by :mod:`edge.openai`, not by a framework: FastAPI's own handling answers NaN and
lone surrogates with 500 and echoes what was sent. Parsing, templating and tokenizing run in a worker thread, so that a
long prompt does not hold up the streams of others. docs/http-api.md describes the API for its users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from edge.errors import CancelledError, QwedgeError, RequestError
from edge.http import openapi
from edge.http.access import Access
from edge.http.audit import AuditLog
from edge.http.errors import error_response
from edge.http.guard import Guard
from edge.http.idempotency import Idempotency
from edge.http.routes.anthropic import anthropic_routes
from edge.http.routes.device import DeviceSources, device_routes
from edge.http.routes.embeddings import embedding_routes
from edge.http.routes.evaluation import Evaluations, evaluation_routes
from edge.http.routes.information import STATIC, information_routes
from edge.http.routes.management import management_routes
from edge.http.routes.ollama import ollama_routes
from edge.http.routes.openai import openai_routes
from edge.http.routes.queue import queue_routes
from edge.http.routes.responses import response_routes
from edge.http.routes.text import text_routes
from edge.http.upstream import Upstream, Upstreams
from edge.journal import Journal
from edge.log_buffer import LogBuffer
from edge.management import Management
from edge.service import Service
from edge.settings.server import ServerSettings


def create_app(
    service: Service,
    settings: ServerSettings,
    *,
    problem: Callable[[], str | None] = lambda: None,
    device: DeviceSources | None = None,
    evaluations: Callable[[], Evaluations] | None = None,
    access: Access | None = None,
    audit: AuditLog | None = None,
    journal: Journal | None = None,
    upstreams: Sequence[Upstream] = (),
    management: Management | None = None,
) -> Starlette:
    """The application; it starts and stops nothing.

    Args:
        service: takes the requests; whoever made it starts and stops it.
        settings: limits and allowed hosts.
        problem: tells what else does not work as it should, for ``/health``; None where all is well.
        device: what the page's device view shows besides the service; None = nothing.
        evaluations: gives what runs suites for the page's evaluate view, once it is wanted; None = there is none.
        access: who may do what; None: everybody anything.
        audit: notes requests; whoever made it starts and stops it.
        journal: keeps requests that have an idempotency key, and their answers; opened when the first one comes, and
            closed by whoever made it. None: in memory.
        upstreams: answer for other models.
        management: switches models and begins anew; None = that is not offered.
    """
    routes = [
        *openai_routes(service),
        *response_routes(service),
        *embedding_routes(service),
        *text_routes(service),
        *anthropic_routes(service),
        *ollama_routes(service),
        *queue_routes(service),
        *information_routes(service, problem, settings.upstream),
        *device_routes(service, device or DeviceSources(LogBuffer())),
        *([] if evaluations is None else evaluation_routes(evaluations)),
        *([] if management is None else management_routes(management)),
    ]
    # What goes to an upstream takes no place in the queue, and nobody knows where it goes before its body is read.
    check_room = (lambda: None) if upstreams else service.check_room
    return Starlette(
        routes=[*routes, _document(routes), Mount("/static", StaticFiles(directory=STATIC), name="static")],
        middleware=[
            Middleware(Guard, settings=settings, check_room=check_room, access=access, audit=audit),
            Middleware(Idempotency, journal=journal or Journal(), check_room=check_room),
            *([Middleware(Upstreams, service=service, upstreams=upstreams)] if upstreams else []),
        ],
        exception_handlers=dict.fromkeys((QwedgeError, HTTPException, ClientDisconnect), _answer_error),
    )


def _document(routes: Sequence[Route]) -> Route:
    document = cache(lambda: openapi.describe(routes))

    async def describe(_request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(document))

    return Route("/openapi.json", describe, include_in_schema=False)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, QwedgeError):
        return error_response(error, request.scope)
    if isinstance(error, HTTPException):
        return error_response(_routing_error(error), request.scope, error.headers)
    assert isinstance(error, ClientDisconnect)
    return error_response(CancelledError("the client went away"), request.scope)


def _routing_error(error: HTTPException) -> RequestError:
    """Starlette's 404 and 405 in the error tree."""
    result = RequestError(error.detail.lower(), hint="see /openapi.json for what this server answers")
    result.status = error.status_code
    result.code = error.detail.lower().replace(" ", "_")
    return result
