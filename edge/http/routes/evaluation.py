"""Evaluations over HTTP: run a suite against what is served, follow it, compare it with an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge.errors import RequestError
from edge.openai import parse_body
from edge.violations import violation


class Evaluations(Protocol):
    """Whoever runs suites; safe to use from any thread."""

    def overview(self) -> Mapping[str, Any]:
        """Suites, the run under way, and past runs."""

    def start(self, name: str, limit: int | None) -> Mapping[str, Any]:
        """Begin a run; gives its state.

        Raises:
            RequestError: there is no such suite, or it executes code; or another run is under way.
        """

    def get(self, run_id: str, baseline_id: str | None) -> Mapping[str, Any]:
        """A run with its cases, and how it compares with another one.

        Raises:
            RequestError: there is no such run.
        """

    def cancel(self, run_id: str) -> None:
        """End a run, or forget a finished one.

        Raises:
            RequestError: there is no such run.
        """


class EvaluationRequest(BaseModel):
    """The body of ``POST /v1/evaluations``."""

    model_config = ConfigDict(strict=True)

    suite: Annotated[str, Field(min_length=1, max_length=64)]
    """Name of a suite that comes with qwedge."""
    limit: Annotated[int, Field(ge=1, le=5000)] | None = None
    """Most cases of it, spread evenly."""


def evaluation_routes(make: Callable[[], Evaluations]) -> list[Route]:
    """The routes.

    Args:
        make: gives whoever runs the suites; called once, with the first request, in a worker thread.
    """
    evaluations = cache(make)

    async def overview(_request: Request) -> Response:
        """The suites that can be run, the run under way, and past runs."""
        return JSONResponse(await run_in_threadpool(lambda: evaluations().overview()))

    async def start(request: Request) -> Response:
        """Run a suite in the background, one question at a time: 202 with its state; 409 while another one runs."""
        wanted = _parse(parse_body(await request.body()))
        return JSONResponse(await run_in_threadpool(lambda: evaluations().start(wanted.suite, wanted.limit)), 202)

    async def get(request: Request) -> Response:
        """A run: progress, cases, and with ``?compare=ID`` the comparison with another one."""
        run_id, baseline = request.path_params["id"], request.query_params.get("compare")
        return JSONResponse(await run_in_threadpool(lambda: evaluations().get(run_id, baseline)))

    async def cancel(request: Request) -> Response:
        """End a run that is under way, or forget a finished one."""
        await run_in_threadpool(lambda: evaluations().cancel(request.path_params["id"]))
        return Response(status_code=204)

    return [
        Route("/v1/evaluations", overview),
        Route("/v1/evaluations", start, methods=["POST"]),
        Route("/v1/evaluations/{id}", get),
        Route("/v1/evaluations/{id}", cancel, methods=["DELETE"]),
    ]


def _parse(body: Mapping[str, Any]) -> EvaluationRequest:
    try:
        return EvaluationRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"]))
        raise RequestError(f"{param}: {violation(first['msg'])}", hint="see docs/http-api.md", param=param) from None
