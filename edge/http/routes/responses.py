"""OpenAI's responses: ``/v1/responses``."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge.http.answering import NAMED_EVENTS, respond
from edge.http.caller import answer_events
from edge.model import Model
from edge.openai import parse_body, prepare
from edge.openai.responses import ResponseRequest, ResponseWriter, own_names, parse_response, to_chat
from edge.service import GenerationRequest, Service


def response_routes(service: Service) -> list[Route]:
    """The routes of the API."""

    async def responses(request: Request) -> Response:
        """The model's next turn, streamed with ``"stream": true``; nothing is stored."""
        wanted, generation, writer = await run_in_threadpool(_read, service.model, await request.body())
        stream = answer_events(request, service, [generation], wanted.model)
        with own_names():
            return await respond(request, writer, stream, NAMED_EVENTS if wanted.stream else None)

    return [Route("/v1/responses", responses, methods=["POST"])]


def _read(model: Model, payload: bytes) -> tuple[ResponseRequest, GenerationRequest, ResponseWriter]:
    request = parse_response(parse_body(payload))
    chat = to_chat(request)
    with own_names():
        (generation,) = prepare(model, chat)
    return request, generation, ResponseWriter(model, request, chat, generation)
