"""What a server tells of itself: models, health, metrics, and the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from edge import __version__
from edge.http.caller import caller_of
from edge.metrics import CONTENT_TYPE
from edge.model import Model
from edge.service import Service
from edge.settings.upstream import UpstreamSettings

STATIC = Path(__file__).parent.parent / "static"

_WORKING: Final = {"ok", "degraded"}


def information_routes(
    service: Service, problem: Callable[[], str | None], upstreams: Sequence[UpstreamSettings] = ()
) -> list[Route]:
    """The routes.

    Args:
        service: what is served.
        problem: tells what else does not work as it should; None where all is well.
        upstreams: answer for other models.
    """
    elsewhere = {
        model: _describe_elsewhere(upstream.name, model) for upstream in upstreams for model in upstream.models
    }

    async def list_models(request: Request) -> Response:
        """The served model, by itself and with each adapter: as far as the key allows them."""
        known = await run_in_threadpool(service.model.names)
        names = [name for name in known if caller_of(request).may_use(name)]
        data = [_describe_model(service.model, name) for name in names]
        data += [entry for name, entry in elsewhere.items() if name not in known and caller_of(request).may_use(name)]
        ids = [entry["id"] for entry in data] or [None]
        return JSONResponse({"object": "list", "data": data, "first_id": ids[0], "last_id": ids[-1], "has_more": False})

    async def get_model(request: Request) -> Response:
        """The served model, or the model with an adapter; 404 for another name."""
        name = request.path_params["name"]
        caller_of(request).check_model(name)
        if name in elsewhere and name != service.model.manifest.name:
            return JSONResponse(elsewhere[name])
        await run_in_threadpool(service.model.find_adapter, name)
        return JSONResponse(_describe_model(service.model, name))

    async def health(_request: Request) -> Response:
        """Whether the server makes progress: 200 with status ok or degraded, or 503 with draining or stalled."""
        body = _health(service, problem())
        return JSONResponse(body, 200 if body["status"] in _WORKING else 503)

    async def live(_request: Request) -> Response:
        """Whether to leave the process alone: 200, or 503 where it hangs and a restart would help."""
        body = _health(service, problem())
        return JSONResponse(body, 200 if body["live"] else 503)

    async def ready(_request: Request) -> Response:
        """Whether to send requests here: 200, or 503 while it hangs, stops, or its queue is full."""
        body = _health(service, problem())
        return JSONResponse(body, 200 if body["ready"] else 503)

    async def metrics(_request: Request) -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.render(service.stats()), media_type=CONTENT_TYPE)

    async def page(_request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{name}", get_model),
        Route("/health", health),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
        Route("/", page, include_in_schema=False),
    ]


def _describe_model(model: Model, name: str) -> dict[str, Any]:
    """A model as both OpenAI's and Anthropic's clients know it: they ask at the same path."""
    manifest = model.manifest
    return {
        "id": name,
        "object": "model",
        "created": int(model.loaded_at),
        "owned_by": "qwedge",
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(int(model.loaded_at), UTC).isoformat(),
        "context_length": model.context_length,
        "parameter_count": manifest.parameter_count,
        "version": manifest.version,
    }


def _describe_elsewhere(upstream: str, name: str) -> dict[str, Any]:
    """A model that another server answers for."""
    return {"id": name, "object": "model", "created": 0, "owned_by": upstream, "type": "model", "display_name": name}


def _health(service: Service, problem: str | None) -> dict[str, Any]:
    stats = service.stats()
    status = "ok" if problem is None else "degraded"
    if not stats.accepting:
        status = "draining"
    elif stats.stalled:
        status = "stalled"
    return {
        "status": status,
        "live": status != "stalled",
        "ready": status in _WORKING and stats.num_waiting < stats.max_queue,
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
