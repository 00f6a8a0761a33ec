"""Who sends a request and what he may do, and how that reaches the routes.

The guard gives every request an :class:`Exchange`; a route that lets the model answer takes its events from
:func:`answer_events`, which acts in the caller's name and notes what the answer cost.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from starlette.requests import Request
from starlette.types import Scope

from edge.http.rights import Caller
from edge.service import Event, Failed, Finished, GenerationRequest, Service, events


@dataclass
class Exchange:
    """One request and its answer, without their texts: what the log and the audit log tell."""

    id: str
    caller: Caller = field(default_factory=Caller)
    model: str = ""
    """What answers, once that is known."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    failed: bool = False
    """Whether the answer ended with an error, be it in the midst of a stream."""

    def note(self, event: Event) -> None:
        """Count an event of the answer."""
        if isinstance(event, Finished | Failed):
            self.num_prompt_tokens += event.timings.num_prompt_tokens
            self.num_output_tokens += event.timings.num_output_tokens
            self.failed |= isinstance(event, Failed)


def begin_exchange(scope: Scope, request_id: str) -> Exchange:
    """Give a request its exchange."""
    exchange = Exchange(request_id)
    scope.setdefault("state", {})["exchange"] = exchange
    return exchange


def exchange_of(request: Request) -> Exchange:
    """The request's exchange; the guard has made it."""
    exchange = request.state.exchange
    assert isinstance(exchange, Exchange)
    return exchange


def caller_of(request: Request) -> Caller:
    """Who sends the request."""
    return exchange_of(request).caller


def identity_of(request: Request) -> str:
    """What cached prefixes are kept apart by."""
    return caller_of(request).identity


async def answer_events(
    request: Request, service: Service, generations: Sequence[GenerationRequest], model: str | None = None
) -> AsyncGenerator[tuple[int, Event], None]:
    """:func:`edge.service.events` in the name of whoever sent the request.

    Args:
        request: tells who asks, and is told what the answer cost.
        service: answers.
        generations: what to generate.
        model: as the client names it; None: the served one.

    Raises:
        ForbiddenError: the caller may not use the model.
        QwedgeError: what :meth:`Service.submit_all` raises; both before the first event.
    """
    exchange = exchange_of(request)
    exchange.model = model or service.model.manifest.name
    exchange.caller.check_model(exchange.model)
    identity = exchange.caller.identity
    owned = [replace(generation, identity=identity, request_id=exchange.id) for generation in generations]
    async with aclosing(events(service, owned)) as stream:
        async for index, event in stream:
            exchange.note(event)
            yield index, event
