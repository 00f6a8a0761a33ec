"""From a request to the sequence that the scheduler runs, and from what the scheduler reports to events."""

from __future__ import annotations

import logging
import time
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge.engine.logprobs import PromptScorer
from edge.engine.pooling import Pooler
from edge.engine.prefix import owned_by
from edge.engine.sampler import Sampler
from edge.engine.thinking import ThoughtsFirst, TokenMask
from edge.errors import ContextOverflowError, QwedgeError, RequestError, UnavailableError
from edge.generation import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    OnEvent,
    Pooled,
    PromptScored,
    Queued,
    Started,
)
from edge.metrics import Metrics
from edge.model import Model
from edge.sequence import FinishReason, Sequence, Timings
from edge.text_stream import TextStream

log = logging.getLogger(__name__)


def assemble(
    model: Model,
    request: GenerationRequest,
    on_event: OnEvent,
    metrics: Metrics,
    *,
    default_max_tokens: int | None = None,
    announces: bool = True,
) -> Sequence:
    """Make the sequence of a request.

    Args:
        model: what is served.
        request: what is asked for.
        on_event: gets the sequence's events.
        metrics: where counts and durations go.
        default_max_tokens: for a request that names no limit; None = until the context is full.
        announces: whether it tells of its waiting and its start.

    Raises:
        ContextOverflowError: the prompt leaves no room for a token.
        RequestError: the prompt is empty or holds an id the model does not have, or the grammar is not usable.
        UnavailableError: the request was prepared for another model.
    """
    if request.prepared_for is not None and request.prepared_for is not model:
        raise UnavailableError("another model is served now", hint="send the request again", retry_after_s=1)
    ids = _prompt(model, request)
    room = model.context_length - len(ids)
    limits = (request.max_tokens, default_max_tokens, room)
    sampler = _sampler(model, request)
    reader = _prompt_reader(model, request)
    text = TextStream(model.tokenizer, request.stop, spared=request.stop_spares)
    return Sequence(
        prompt_ids=ids,
        max_tokens=min(next(limit for limit in limits if limit is not None), room),
        eos_ids=frozenset() if request.ignore_eos else model.eos_ids,
        sampler=sampler,
        consumer=_EventConsumer(on_event, text, sampler, reader, metrics, announces=announces),
        request_id=request.request_id,
        identity=owned_by(request.identity, request.adapter.digest if request.adapter else ""),
        adapter=request.adapter,
        deadline=None if request.deadline_s is None else time.monotonic() + request.deadline_s,
        prompt_reader=reader,
        is_reusable=request.pooling is None,
    )


def _prompt(model: Model, request: GenerationRequest) -> NDArray[np.int64]:
    n_prompt, n_ctx = len(request.prompt_ids), model.context_length
    if n_prompt == 0:
        raise RequestError("the prompt is empty", hint="send at least one token", param="prompt")
    if n_prompt > n_ctx or (n_prompt == n_ctx and request.max_tokens != 0):
        raise ContextOverflowError(n_prompt, n_ctx)
    num_ids = model.manifest.padded_vocab_size
    # Before they become an array: JSON's integers have no bounds.
    if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= num_ids:
        hint = f"use ids from 0 to {num_ids - 1}"
        raise RequestError("the prompt holds a token id outside the vocabulary", hint=hint, param="prompt")
    return np.asarray(request.prompt_ids, dtype=np.int64)


def _sampler(model: Model, request: GenerationRequest) -> Sampler:
    return Sampler(
        request.sampling,
        request.prompt_ids,
        model.manifest.vocab_size,
        constraint=_constraint(model, request),
        num_logprobs=request.num_logprobs,
    )


def _constraint(model: Model, request: GenerationRequest) -> TokenMask | None:
    form = None if request.grammar is None else partial(model.grammars.constraint, request.grammar)
    if request.thinking is None:
        return None if form is None else form()
    return ThoughtsFirst(request.thinking, model.tokenizer, model.eos_ids, form)


def _prompt_reader(model: Model, request: GenerationRequest) -> PromptScorer | Pooler | None:
    if request.pooling is not None:
        if model.manifest.hidden_size is None:
            hint = "export it again: bundles of this version have what embeddings are made of"
            raise RequestError("the served model makes no embeddings", hint=hint, param="model")
        return Pooler(request.pooling)
    if not request.score_prompt or request.num_logprobs is None:
        return None
    return PromptScorer(request.prompt_ids, model.manifest.vocab_size, request.num_logprobs)


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
        last = self._text.flush()
        self._emit(Finished(reason, last, timings, self._sampler.take_logprobs(), self._text.matched_stop))

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
