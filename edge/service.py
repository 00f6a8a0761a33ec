"""One request in, one stream of events out: what every front end talks to.

A front end turns its wire format into a :class:`GenerationRequest` (see ``edge.openai``), submits it with a callback
and receives :data:`Event` values: ``Queued`` (any number), ``Started`` (at most one), ``PromptScored`` or ``Pooled``
(one where it is asked for), ``Delta`` (any number) and exactly one terminal event, ``Finished`` or ``Failed``. They
come on the engine's thread, the first ``Queued`` on the submitting one; callbacks must only hand the event over.

Several answers to one question, or to a batch of them, are several requests that :meth:`Service.submit_all` takes or
refuses as one. Each event comes with the index of its request then. :func:`events` hands them to asyncio.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from edge.assembly import assemble
from edge.engine.heap import trim_heap
from edge.engine.providers import MADE_FOR_CPU, Choice
from edge.errors import QwedgeError, RequestError, UnavailableError
from edge.generation import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    OnEvent,
    OnIndexedEvent,
    Pooled,
    PromptScored,
    Queued,
    Started,
)
from edge.metrics import Metrics
from edge.model import Model
from edge.scheduler import Place, Scheduler, SchedulerStats, SlotStats
from edge.sequence import Sequence as EngineSequence

__all__ = [
    "Delta",
    "Event",
    "Failed",
    "Finished",
    "GenerationRequest",
    "Loaded",
    "OnEvent",
    "OnIndexedEvent",
    "Pooled",
    "PromptScored",
    "Queued",
    "Service",
    "Started",
    "Ticket",
    "events",
]

SWITCH_RETRY_S = 5.0
"""When to try again while another model is loaded."""


class Ticket:
    """One or several requests that were submitted together."""

    def __init__(self, scheduler: Scheduler, sequences: Sequence[EngineSequence]) -> None:
        self._scheduler = scheduler
        self._sequences = sequences

    def cancel(self) -> None:
        """End what has not ended at the engine's next step, wherever it is; the terminal event is ``Failed``."""
        for sequence in self._sequences:
            self._scheduler.cancel(sequence)


@dataclass(frozen=True)
class Loaded:
    """A bundle in memory: its text side, and what runs its sequences."""

    model: Model
    scheduler: Scheduler
    default_max_tokens: int | None = None
    """For requests that name no limit; None = until the context is full."""
    provider: Choice = MADE_FOR_CPU
    """What computes."""


class Service:
    """Accepts requests for one model and streams back their events.

    Args:
        loaded: what is served; its scheduler is started and stopped by the service.
        metrics: where counts and durations go.
    """

    def __init__(self, loaded: Loaded, metrics: Metrics) -> None:
        self.model = loaded.model
        """What is served; while models are switched, what was served last."""
        self.provider = loaded.provider
        """What computes it."""
        self.metrics = metrics
        self._loaded: Loaded | None = loaded
        self._stats = loaded.scheduler.stats()
        """The last ones before a switch, for as long as it lasts."""
        self._changing = threading.Lock()
        """Held by who starts, stops or switches."""
        self._stopped = False

    def start(self) -> None:
        """Accept requests."""
        with self._changing:
            self._stopped = False
            if self._loaded is not None:
                self._loaded.scheduler.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, finish those that can within ``drain_s`` seconds, fail the rest with 503."""
        self._stopped = True
        with self._changing:
            if self._loaded is not None:
                self._loaded.scheduler.stop(drain_s)

    def switch(self, load: Callable[[], Loaded], drain_s: float = 0.0) -> None:
        """Serve what ``load`` returns.

        The present model leaves the memory first, as a small device cannot hold two: from now on requests are refused
        with 503, those that run may finish within ``drain_s`` seconds. Where ``load`` fails nothing is served until
        another switch.

        Raises:
            UnavailableError: the service is stopping.
            QwedgeError: what ``load`` raises.
        """
        with self._changing:
            self._unload(drain_s)
            loaded = load()
            if self._stopped:
                raise UnavailableError("the server is shutting down", hint="try again when it is back")
            loaded.scheduler.start()
            self.model, self.provider, self._loaded = loaded.model, loaded.provider, loaded

    def _unload(self, drain_s: float) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        self._stats = replace(loaded.scheduler.stats(), num_waiting=0, num_running=0, accepting=False, kv_bytes=0)
        loaded.scheduler.stop(drain_s)
        del loaded
        gc.collect()  # the weights go with the last reference to the engine
        trim_heap()

    def unload(self) -> None:
        """Let the weights leave the memory as soon as nothing runs; the next request brings them back."""
        loaded = self._loaded
        if loaded is not None:
            loaded.scheduler.unload()

    def stats(self) -> SchedulerStats:
        """How busy the service is."""
        loaded = self._loaded
        return self._stats if loaded is None else loaded.scheduler.stats()

    def busy_slots(self) -> list[SlotStats]:
        """What the engine works on right now."""
        loaded = self._loaded
        return [] if loaded is None else loaded.scheduler.busy_slots()

    def queue(self) -> list[Place]:
        """Where the waiting sequences are, in their order."""
        loaded = self._loaded
        return [] if loaded is None else loaded.scheduler.queue()

    def find(self, request_id: str) -> Place | None:
        """Where a request is; None where it has ended or was never here."""
        loaded = self._loaded
        return None if loaded is None else loaded.scheduler.find(request_id)

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> Ticket:
        """Queue a request; its events arrive at ``on_event`` until a terminal one.

        Raises:
            ContextOverflowError: the prompt leaves no room for a token.
            RequestError: the prompt is empty or holds an id the model does not have, or the grammar is not usable.
            OverloadedError: the queue is full.
            UnavailableError: the service is stopping, another model is being loaded, or the request was prepared for
                another one.
        """
        return self.submit_all([request], lambda _index, event: on_event(event))

    def submit_all(self, requests: Sequence[GenerationRequest], on_event: OnIndexedEvent) -> Ticket:
        """Queue requests that stand and fall together: all are queued or none, and when one fails, all are cancelled.

        ``Queued`` and ``Started`` come for the first one only and speak for all.

        Raises:
            RequestError: what :meth:`submit` raises; or there are more requests than the queue ever holds.
            OverloadedError: the queue has no room for all of them.
            UnavailableError: what :meth:`submit` raises.
        """
        try:
            return self._submit_to(self._present(), requests, on_event)
        except QwedgeError as error:
            self.metrics.refused(error)
            raise

    def check_room(self) -> None:
        """Whether a request would be queued now: under overload, before its prompt is looked at.

        Raises:
            OverloadedError: the queue is full.
            UnavailableError: the service is stopping, or another model is being loaded.
        """
        try:
            self._present().scheduler.check_room()
        except QwedgeError as error:
            self.metrics.refused(error)
            raise

    def _present(self) -> Loaded:
        if (loaded := self._loaded) is None:
            hint = "try again in a moment"
            raise UnavailableError("another model is being loaded", hint=hint, retry_after_s=SWITCH_RETRY_S)
        return loaded

    def _submit_to(self, loaded: Loaded, requests: Sequence[GenerationRequest], on_event: OnIndexedEvent) -> Ticket:
        sequences: list[EngineSequence] = []
        ticket = Ticket(loaded.scheduler, sequences)

        def tell(index: int, event: Event) -> None:
            if isinstance(event, Failed):
                ticket.cancel()
            on_event(index, event)

        _check_number(requests, loaded.scheduler.stats().max_queue)
        sequences += [
            assemble(
                loaded.model,
                request,
                partial(tell, index),
                self.metrics,
                default_max_tokens=loaded.default_max_tokens,
                announces=index == 0,
            )
            for index, request in enumerate(requests)
        ]
        loaded.scheduler.submit(*sequences)
        return ticket


def _check_number(requests: Sequence[GenerationRequest], room: int) -> None:
    if len(requests) > room:
        param = "n" if len({request.prompt_ids for request in requests}) == 1 else "prompt"
        hint = f"ask for {room} at most"
        raise RequestError(f"{len(requests)} answers at once never fit the queue", hint=hint, param=param)


async def events(service: Service, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, Event], None]:
    """Submit requests together and iterate over their events, each with its request's index.

    The iteration ends when all have finished or one has failed; leaving it early cancels what still runs.

    Raises:
        QwedgeError: what :meth:`Service.submit_all` raises, before the first event.
    """
    loop = asyncio.get_running_loop()
    # Bounded by the requests themselves: one event per generated token and one per queue movement.
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def on_event(index: int, event: Event) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, (index, event))

    ticket = service.submit_all(requests, on_event)
    num_running = len(requests)
    try:
        while num_running:
            index, event = await queue.get()
            yield index, event
            if isinstance(event, Failed):
                return
            num_running -= isinstance(event, Finished)
    finally:
        ticket.cancel()
