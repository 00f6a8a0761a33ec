"""Ollama's API, under ``/api``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge import __version__
from edge.errors import RequestError
from edge.http.answering import LINES, respond
from edge.http.caller import answer_events, caller_of
from edge.http.disconnect import unless_disconnected
from edge.http.routes.embeddings import read_inputs
from edge.model import Model
from edge.ollama import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    LineWriter,
    Named,
    ShowBody,
    describe_entry,
    describe_loaded,
    describe_model,
    generation_of,
    loaded,
    parse,
    served_name,
    to_embedding,
    to_openai,
)
from edge.openai import parse_body
from edge.openai.embeddings import EmbeddingRequest, prepare_embedding, unit_vector
from edge.service import Event, Failed, GenerationRequest, Service

API_VERSION: Final = "0.13.0"
"""The version of Ollama whose API this is: clients refuse to talk to older ones than they know."""
_STORE: Final = ("pull", "push", "create", "copy", "delete")

AnyBody = TypeVar("AnyBody", bound=Named)


def ollama_routes(service: Service) -> list[Route]:
    """The routes of the API."""

    async def chat(request: Request) -> Response:
        """The model's next message in a conversation, streamed unless ``"stream": false``."""
        return await _generate(service, ChatBody, request)

    async def generate(request: Request) -> Response:
        """The answer to a prompt, streamed unless ``"stream": false``."""
        return await _generate(service, GenerateBody, request)

    async def embed(request: Request) -> Response:
        """A vector of length 1 for each text."""
        began = time.monotonic()
        body = await _body(service, EmbedBody, request)
        vectors, num_tokens = await _embed(service, request, body)
        duration = {"total_duration": round((time.monotonic() - began) * 1e9), "load_duration": 0}
        counts = {**duration, "prompt_eval_count": num_tokens}
        return JSONResponse({"model": body.model, "embeddings": vectors, **counts})

    async def embeddings(request: Request) -> Response:
        """A vector of length 1 for a text: the older form."""
        body = await _body(service, EmbeddingsBody, request)
        (vector,), _ = await _embed(service, request, body.newer)
        return JSONResponse({"embedding": vector})

    async def tags(request: Request) -> Response:
        """The served model, by itself and with each adapter."""
        names = await run_in_threadpool(service.model.names)
        may_use = caller_of(request).may_use
        return JSONResponse({"models": [describe_entry(service.model, name) for name in names if may_use(name)]})

    async def show(request: Request) -> Response:
        """What a model is and can do."""
        await _body(service, ShowBody, request)
        return JSONResponse(await run_in_threadpool(describe_model, service.model))

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
        Route("/api/embed", embed, methods=["POST"]),
        Route("/api/embeddings", embeddings, methods=["POST"]),
        Route("/api/tags", tags),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/ps", running),
        Route("/api/version", version),
        *(Route(f"/api/{verb}", store, methods=["POST", "DELETE"], include_in_schema=False) for verb in _STORE),
    ]


async def _generate(service: Service, schema: type[ChatBody | GenerateBody], request: Request) -> Response:
    body: ChatBody | GenerateBody = await _body(service, schema, request)
    if body.is_empty:
        return JSONResponse(await _load(service, request, body))
    writer, generation = await run_in_threadpool(_prepare, service.model, body)
    stream = answer_events(request, service, [generation], served_name(body.model))
    return await respond(request, writer, stream, LINES if body.streams else None)


async def _body(service: Service, schema: type[AnyBody], request: Request) -> AnyBody:
    """The request's body, which names a model that is there."""
    return await run_in_threadpool(_parse, service.model, schema, await request.body())


def _parse(model: Model, schema: type[AnyBody], payload: bytes) -> AnyBody:
    body = parse(schema, parse_body(payload))
    model.find_adapter(served_name(body.model))
    return body


def _prepare(model: Model, body: ChatBody | GenerateBody) -> tuple[LineWriter, GenerationRequest]:
    wanted = to_openai(model, body)
    generation = generation_of(model, wanted, body.given_options)
    return LineWriter(model, body, wanted, generation), generation


async def _embed(service: Service, request: Request, body: EmbedBody) -> tuple[list[list[float]], int]:
    """A vector for each text, and the number of tokens that were read."""
    wanted, generations = await run_in_threadpool(_prepare_embedding, service.model, body)
    reading = read_inputs(request, service, generations, wanted.model)
    vectors = await unless_disconnected(request.receive, reading)
    units = [unit_vector(vector, wanted.dimensions).tolist() for vector in vectors]
    return units, sum(len(generation.prompt_ids) for generation in generations)


def _prepare_embedding(model: Model, body: EmbedBody) -> tuple[EmbeddingRequest, Sequence[GenerationRequest]]:
    wanted = to_embedding(model, body)
    return wanted, prepare_embedding(model, wanted)


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
