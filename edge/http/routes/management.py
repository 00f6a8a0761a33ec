"""Managing the server over HTTP: installed models, which of them is served, and beginning anew."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge.errors import ModelNotFoundError
from edge.management import Kind, Management
from edge.store import Installed

_SHOWN = ("name", "model", "version", "counter", "size_bytes", "signed_by", "active", "previous", "failed")


def management_routes(management: Management) -> list[Route]:
    """The routes; where keys are asked for they take the scope ``manage``, the list ``read``.

    Args:
        management: carries it out.
    """

    async def bundles(_request: Request) -> Response:
        """The installed bundles, and the operation that is running or ran last; 404 without a model store."""
        return JSONResponse(await run_in_threadpool(_describe, management))

    async def switch(request: Request) -> Response:
        """Verify a bundle, serve it in place of the present one, and go back should it not work: 202."""
        return await _begin(management, "switch", request.path_params["name"])

    async def verify(request: Request) -> Response:
        """Check every file of a bundle, and its signature where keys are trusted: 202."""
        return await _begin(management, "verify", request.path_params["name"])

    async def rollback(_request: Request) -> Response:
        """Serve the bundle that was served before: 202."""
        return await _begin(management, "rollback")

    async def reload(_request: Request) -> Response:
        """Check the settings, and begin anew with them: 202."""
        return await _begin(management, "reload")

    async def restart(_request: Request) -> Response:
        """Let running requests finish and begin anew: 202."""
        return await _begin(management, "restart")

    async def unload(_request: Request) -> Response:
        """Let the weights leave the memory as soon as nothing runs; the next request brings them back."""
        await run_in_threadpool(management.unload)
        return Response(status_code=204)

    async def load(_request: Request) -> Response:
        """Bring the weights back into memory, if they have left it."""
        await run_in_threadpool(management.load)
        return Response(status_code=204)

    return [
        Route("/v1/bundles", bundles),
        Route("/v1/bundles/rollback", rollback, methods=["POST"]),
        Route("/v1/bundles/{name}/switch", switch, methods=["POST"]),
        Route("/v1/bundles/{name}/verify", verify, methods=["POST"]),
        Route("/v1/device/unload", unload, methods=["POST"]),
        Route("/v1/device/load", load, methods=["POST"]),
        Route("/v1/device/reload", reload, methods=["POST"]),
        Route("/v1/device/restart", restart, methods=["POST"]),
    ]


async def _begin(management: Management, kind: Kind, name: str | None = None) -> Response:
    operation = await run_in_threadpool(management.begin, kind, name)
    return JSONResponse(operation.describe(), 202)


def _describe(management: Management) -> dict[str, Any]:
    if not management.has_store:
        hint = "install bundles with `qwedge install` and start `qwedge serve` without --bundle"
        raise ModelNotFoundError("this server has no model store", hint=hint)
    operation = management.operation
    return {
        "served": management.served,
        "bundles": [_bundle(installed) for installed in management.bundles()],
        "operation": None if operation is None else operation.describe(),
    }


def _bundle(installed: Installed) -> dict[str, Any]:
    """A bundle without its path: what lies where is nobody's business."""
    described = installed.describe()
    return {key: described[key] for key in (*_SHOWN, "installed_at")}
