"""Who waits and what is worked on, without a word of what anybody says: ``/v1/queue`` and ``/slots``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge.errors import RequestError
from edge.scheduler import Place, SlotStats
from edge.service import Service


def queue_routes(service: Service) -> list[Route]:
    """The routes."""

    async def show_queue(_request: Request) -> Response:
        """How many wait and run, and for how long who waits will still do so."""
        stats = service.stats()
        counts = {
            "waiting": stats.num_waiting,
            "running": stats.num_running,
            "slots": stats.slots,
            "max_waiting": stats.max_queue,
            "accepting": stats.accepting,
        }
        return JSONResponse({**counts, "entries": [_describe_place(place) for place in service.queue()]})

    async def show_place(request: Request) -> Response:
        """Where a request is, by its ``x-request-id``; 404 once it has ended."""
        request_id = request.path_params["id"]
        place = service.find(request_id)
        if place is None:
            raise _not_here()
        return JSONResponse({"id": request_id, **_describe_place(place)})

    async def show_slots(_request: Request) -> Response:
        """What each slot works on."""
        busy = {slot.slot: slot for slot in service.busy_slots()}
        return JSONResponse([_describe_slot(number, busy.get(number)) for number in range(service.stats().slots)])

    return [
        Route("/v1/queue", show_queue),
        Route("/v1/queue/{id}", show_place),
        Route("/slots", show_slots),
    ]


def _not_here() -> RequestError:
    hint = "it has ended, or was never sent; the id is that of the x-request-id header"
    error = RequestError("no request of this id waits or runs", hint=hint, param="id")
    error.status, error.code = 404, "not_found"
    return error


def _describe_place(place: Place) -> dict[str, Any]:
    return {
        "status": place.status,
        "position": place.position,
        "eta_s": None if place.eta_s is None else round(place.eta_s, 2),
        "age_s": round(place.age_s, 2),
        "prompt_tokens": place.num_prompt_tokens,
        "output_tokens": place.num_output_tokens,
    }


def _describe_slot(number: int, slot: SlotStats | None) -> dict[str, Any]:
    if slot is None:
        return {"id": number, "status": "idle", "is_processing": False}
    return {
        "id": number,
        "status": slot.status,
        "is_processing": True,
        "prompt_tokens": slot.num_prompt_tokens,
        "cached_tokens": slot.num_cached_tokens,
        "output_tokens": slot.num_output_tokens,
        "tokens_per_second": round(slot.tokens_per_s, 2),
        "age_s": round(slot.age_s, 2),
    }
