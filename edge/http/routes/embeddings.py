"""OpenAI's embeddings: ``/v1/embeddings``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge.http.caller import answer_events
from edge.http.disconnect import unless_disconnected
from edge.model import Model
from edge.openai import parse_body
from edge.openai.embeddings import EmbeddingRequest, embedding_body, parse_embedding, prepare_embedding
from edge.service import Failed, GenerationRequest, Pooled, Service

_AT_ONCE = 4
"""Inputs in the queue at once: a batch does not keep everybody else waiting."""


def embedding_routes(service: Service) -> list[Route]:
    """The routes of the API."""

    async def embeddings(request: Request) -> Response:
        """A vector of length 1 for each input."""
        model = service.model
        wanted, generations = await run_in_threadpool(_read, model, await request.body())
        vectors = await unless_disconnected(request.receive, read_inputs(request, service, generations, wanted.model))
        num_tokens = sum(len(generation.prompt_ids) for generation in generations)
        return JSONResponse(await run_in_threadpool(embedding_body, wanted, model.manifest.name, vectors, num_tokens))

    return [Route("/v1/embeddings", embeddings, methods=["POST"])]


def _read(model: Model, payload: bytes) -> tuple[EmbeddingRequest, Sequence[GenerationRequest]]:
    request = parse_embedding(parse_body(payload))
    return request, prepare_embedding(model, request)


async def read_inputs(
    request: Request, service: Service, generations: Sequence[GenerationRequest], model: str | None
) -> list[NDArray[np.float32]]:
    """The vectors of the inputs, in their order, as the service gives them.

    Raises:
        QwedgeError: an input failed or was refused.
    """
    vectors: dict[int, NDArray[np.float32]] = {}
    for start in range(0, len(generations), _AT_ONCE):
        group = generations[start : start + _AT_ONCE]
        async with aclosing(answer_events(request, service, group, model)) as stream:
            async for index, event in stream:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Pooled):
                    vectors[start + index] = event.vector
    return [vectors[index] for index in range(len(generations))]
