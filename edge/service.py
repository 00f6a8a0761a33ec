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
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge.engine.grammar_source import Grammar
from edge.engine.logprobs import PromptScorer, TokenLogprobs
from edge.engine.lora import Adapter
from edge.engine.pooling import Pooler, Pooling
from edge.engine.prefix import owned_by
from edge.engine.sampler import Sampler, SamplingParams
from edge.errors import ContextOverflowError, QwedgeError, RequestError
from edge.metrics import Metrics
from edge.model import Model
from edge.scheduler import Scheduler, SchedulerStats, SlotStats
from edge.sequence import FinishReason, Timings
from edge.sequence import Sequence as EngineSequence
from edge.text_stream import TextStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate; independent of the wire format."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int | None = None
    """Most tokens to generate; None = until the context is full; 0 = read the prompt only."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it."""
    deadline_s: float | None = None
    """Seconds from submission after which the request fails with 408."""
    identity: str = ""
    """Who asks; cached prefixes are shared within an identity only."""
    ignore_eos: bool = False
    """Generate past end-of-sequence tokens: for benchmarks."""
    num_logprobs: int | None = None
    """Alternatives to report with each token's log-probability, 0 to 20; None reports nothing."""
    score_prompt: bool = False
    """Report the log-probabilities of the prompt's tokens too; needs ``num_logprobs``. Takes no cached prefix."""
    pooling: Pooling | None = None
    """Make one vector of the prompt instead of an answer; needs ``max_tokens`` 0. Takes no cached prefix."""
    adapter: Adapter | None = None
    """What answers besides the model: :meth:`Model.find_adapter` finds it."""
    grammar: Grammar | None = None
    """The form the answer must have. On an event loop, :meth:`Model.check_grammar` comes first, in a worker thread."""


@dataclass(frozen=True)
class Queued:
    """The request waits behind ``position`` others."""

    position: int
    eta_s: float


@dataclass(frozen=True)
class Started:
    """Prefill begins."""


@dataclass(frozen=True)
class PromptScored:
    """The prompt was read: how probable its tokens were."""

    logprobs: tuple[TokenLogprobs, ...]
    """Of the second token to the last: nothing predicts the first."""


@dataclass(frozen=True)
class Pooled:
    """The prompt was read: the vector that it became."""

    vector: NDArray[np.float32]
    """[hidden_size], of whatever length it came out."""


@dataclass(frozen=True)
class Delta:
    """A token was generated."""

    text: str
    """Text that became final: valid UTF-8, free of stop strings; may be empty."""
    token_id: int
    logprobs: TokenLogprobs | None = None
    """Where the request asks for them."""


@dataclass(frozen=True)
class Finished:
    """Terminal: the answer is complete."""

    reason: FinishReason
    text: str
    """Text held back until now; append it to the deltas."""
    timings: Timings
    logprobs: TokenLogprobs | None = None
    """Of the token that ended the answer, where the model ended it and the request asks for them."""


@dataclass(frozen=True)
class Failed:
    """Terminal: no (complete) answer."""

    error: QwedgeError
    timings: Timings


Event = Queued | Started | PromptScored | Pooled | Delta | Finished | Failed
OnEvent = Callable[[Event], None]
OnIndexedEvent = Callable[[int, Event], None]


class Ticket:
    """One or several requests that were submitted together."""

    def __init__(self, scheduler: Scheduler, sequences: Sequence[EngineSequence]) -> None:
        self._scheduler = scheduler
        self._sequences = sequences

    def cancel(self) -> None:
        """End what has not ended at the engine's next step, wherever it is; the terminal event is ``Failed``."""
        for sequence in self._sequences:
            self._scheduler.cancel(sequence)


class Service:
    """Accepts requests for one model and streams back their events.

    Args:
        model: the served model's text side.
        scheduler: runs the sequences; started and stopped by the service.
        metrics: where counts and durations go.
        default_max_tokens: for requests that name no limit; None = until the context is full.
    """

    def __init__(
        self, model: Model, scheduler: Scheduler, metrics: Metrics, *, default_max_tokens: int | None = None
    ) -> None:
        self.model = model
        self.metrics = metrics
        self._scheduler = scheduler
        self._default_max_tokens = default_max_tokens

    def start(self) -> None:
        """Accept requests."""
        self._scheduler.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, finish those that can within ``drain_s`` seconds, fail the rest with 503."""
        self._scheduler.stop(drain_s)

    def stats(self) -> SchedulerStats:
        """How busy the service is."""
        return self._scheduler.stats()

    def busy_slots(self) -> list[SlotStats]:
        """What the engine works on right now."""
        return self._scheduler.busy_slots()

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> Ticket:
        """Queue a request; its events arrive at ``on_event`` until a terminal one.

        Raises:
            ContextOverflowError: the prompt leaves no room for a token.
            RequestError: the prompt is empty or holds an id the model does not have, or the grammar is not usable.
            OverloadedError: the queue is full.
            UnavailableError: the service is stopping.
        """
        return self.submit_all([request], lambda _index, event: on_event(event))

    def submit_all(self, requests: Sequence[GenerationRequest], on_event: OnIndexedEvent) -> Ticket:
        """Queue requests that stand and fall together: all are queued or none, and when one fails, all are cancelled.

        ``Queued`` and ``Started`` come for the first one only and speak for all.

        Raises:
            RequestError: what :meth:`submit` raises; or there are more requests than the queue ever holds.
            OverloadedError: the queue has no room for all of them.
            UnavailableError: the service is stopping.
        """
        sequences: list[EngineSequence] = []
        ticket = Ticket(self._scheduler, sequences)

        def tell(index: int, event: Event) -> None:
            if isinstance(event, Failed):
                ticket.cancel()
            on_event(index, event)

        try:
            self._check_number(requests)
            sequences += [
                self._sequence(request, partial(tell, i), announces=i == 0) for i, request in enumerate(requests)
            ]
            self._scheduler.submit(*sequences)
        except QwedgeError as error:
            self.metrics.refused(error)
            raise
        return ticket

    def _check_number(self, requests: Sequence[GenerationRequest]) -> None:
        room = self._scheduler.stats().max_queue
        if len(requests) > room:
            param = "n" if len({request.prompt_ids for request in requests}) == 1 else "prompt"
            hint = f"ask for {room} at most"
            raise RequestError(f"{len(requests)} answers at once never fit the queue", hint=hint, param=param)

    def _sequence(self, request: GenerationRequest, on_event: OnEvent, *, announces: bool = True) -> EngineSequence:
        ids = self._prompt(request)
        room = self.model.context_length - len(ids)
        limits = (request.max_tokens, self._default_max_tokens, room)
        sampler = self._sampler(request)
        reader = self._prompt_reader(request)
        text = TextStream(self.model.tokenizer, request.stop)
        return EngineSequence(
            prompt_ids=ids,
            max_tokens=min(next(limit for limit in limits if limit is not None), room),
            eos_ids=frozenset() if request.ignore_eos else self.model.eos_ids,
            sampler=sampler,
            consumer=_EventConsumer(on_event, text, sampler, reader, self.metrics, announces=announces),
            identity=owned_by(request.identity, request.adapter.digest if request.adapter else ""),
            adapter=request.adapter,
            deadline=None if request.deadline_s is None else time.monotonic() + request.deadline_s,
            prompt_reader=reader,
            is_reusable=request.pooling is None,
        )

    def _prompt(self, request: GenerationRequest) -> NDArray[np.int64]:
        n_prompt, n_ctx = len(request.prompt_ids), self.model.context_length
        if n_prompt == 0:
            raise RequestError("the prompt is empty", hint="send at least one token", param="prompt")
        if n_prompt > n_ctx or (n_prompt == n_ctx and request.max_tokens != 0):
            raise ContextOverflowError(n_prompt, n_ctx)
        num_ids = self.model.manifest.padded_vocab_size
        # Before they become an array: JSON's integers have no bounds.
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= num_ids:
            hint = f"use ids from 0 to {num_ids - 1}"
            raise RequestError("the prompt holds a token id outside the vocabulary", hint=hint, param="prompt")
        return np.asarray(request.prompt_ids, dtype=np.int64)

    def _sampler(self, request: GenerationRequest) -> Sampler:
        model = self.model
        return Sampler(
            request.sampling,
            request.prompt_ids,
            model.manifest.vocab_size,
            constraint=None if request.grammar is None else model.grammars.constraint(request.grammar),
            num_logprobs=request.num_logprobs,
        )

    def _prompt_reader(self, request: GenerationRequest) -> PromptScorer | Pooler | None:
        if request.pooling is not None:
            if self.model.manifest.hidden_size is None:
                hint = "export it again: bundles of this version have what embeddings are made of"
                raise RequestError("the served model makes no embeddings", hint=hint, param="model")
            return Pooler(request.pooling)
        if not request.score_prompt or request.num_logprobs is None:
            return None
        return PromptScorer(request.prompt_ids, self.model.manifest.vocab_size, request.num_logprobs)


class _EventConsumer:
    """Turns what the scheduler reports of one sequence into events."""

    def __init__(
        self,
        on_event: OnEvent,
        text: TextStream,
        sampler: Sampler,
        reader: PromptScorer | Pooler | None,
        metrics: Metrics,
        *,
        announces: bool,
    ) -> None:
        self._on_event = on_event
        self._text = text
        self._sampler = sampler
        self._reader = reader
        self._metrics = metrics
        self._announces = announces

    def queued(self, position: int, eta_s: float) -> None:
        if self._announces:
            self._emit(Queued(position, eta_s))

    def started(self) -> None:
        if self._announces:
            self._emit(Started())

    def token(self, token_id: int) -> FinishReason | None:
        self._tell_reading()
        self._emit(Delta(self._text.push(token_id), token_id, self._sampler.take_logprobs()))
        return "stop" if self._text.stopped else None

    def finished(self, reason: FinishReason, timings: Timings) -> None:
        self._tell_reading()
        self._metrics.finished(reason, timings)
        self._emit(Finished(reason, self._text.flush(), timings, self._sampler.take_logprobs()))

    def _tell_reading(self) -> None:
        """The prompt has been read when anything follows it."""
        reader, self._reader = self._reader, None
        if isinstance(reader, PromptScorer):
            self._emit(PromptScored(reader.scores))
        elif reader is not None:
            self._emit(Pooled(reader.vector))

    def failed(self, error: QwedgeError, timings: Timings) -> None:
        self._metrics.failed(error, timings)
        self._emit(Failed(error, timings))

    def _emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:  # a front end's fault must not reach the engine's thread
            log.exception("a front end failed to take an event")


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
