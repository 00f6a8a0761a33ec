"""From the service's events to OpenAI's chunks and bodies."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from edge.errors import QwedgeError, RequestError
from edge.model import Model
from edge.openai.choice import Choice
from edge.openai.schemas import ChatRequest, CompletionRequest
from edge.openai.shapes import shape_of
from edge.sequence import Timings
from edge.service import Event, Failed, Finished, GenerationRequest, PromptScored


class Answer:
    """Takes the events of one request and gives the chunks of its stream, and in the end the complete body.

    Args:
        model: what answers.
        request: what the client sent.
        generations: what :func:`~edge.openai.prepare.prepare` made of it; each becomes a choice.
    """

    def __init__(
        self, model: Model, request: ChatRequest | CompletionRequest, generations: Sequence[GenerationRequest]
    ) -> None:
        self._shape = shape_of(request)
        self.id = f"{self._shape.id_prefix}-{uuid.uuid4().hex}"
        """The same in all chunks and in the body."""
        self._created = int(time.time())
        self._model_name = request.model or model.manifest.name
        self._include_usage = request.include_usage
        self._num_per_prompt = request.num_choices
        self._choices = [Choice(model, request, generation, index) for index, generation in enumerate(generations)]
        self._failure: Failed | None = None

    @property
    def ended(self) -> bool:
        """Whether all choices have finished, or one has failed and the request with it."""
        return self._failure is not None or all(choice.end for choice in self._choices)

    def chunks(self, index: int, event: Event) -> list[dict[str, Any]]:
        """The chunks to send for an event of a choice; an error body where the request failed."""
        if isinstance(event, Failed):
            self._failure = event
            return [error_body(event.error)]
        if isinstance(event, PromptScored):
            # A prompt's first choice tells it, before the others have begun: the queue keeps its order.
            for choice in self._choices[index : index + self._num_per_prompt]:
                choice.echo_scores(event)
        return list(self._chunks(self._choices[index], event))

    def body(self) -> dict[str, Any]:
        """The complete answer, after the end.

        Raises:
            QwedgeError: the request failed.
        """
        assert self.ended
        if self._failure is not None:
            raise self._failure.error
        wholes = [choice.whole() for choice in self._choices]
        figures = [{"timings": timing_figures(timings)} for timings in self._timings()]
        several = len(wholes) > 1
        return {
            **self._head(self._shape.body_object),
            "choices": [{**whole, **own} for whole, own in zip(wholes, figures, strict=True)] if several else wholes,
            "usage": self._usage(),
            **({} if several else figures[0]),
        }

    def _chunks(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        no_usage_yet = {"usage": None} if self._include_usage else {}
        for part in choice.parts(event):
            figures = {} if choice.end is None else {"timings": timing_figures(choice.end.timings)}
            yield {**self._head(self._shape.chunk_object), "choices": [part], **no_usage_yet, **figures}
        if isinstance(event, Finished) and self.ended and self._include_usage:
            yield {**self._head(self._shape.chunk_object), "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        num_reasoning = sum(choice.num_reasoning_tokens for choice in self._choices)
        details = {"completion_tokens_details": {"reasoning_tokens": num_reasoning}} if num_reasoning else {}
        return {**usage(self._timings(), self._num_per_prompt), **details}

    def _timings(self) -> list[Timings]:
        """Of each choice."""
        return [choice.end.timings for choice in self._choices if choice.end is not None]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model_name}


def usage(timings: Sequence[Timings], num_per_prompt: int = 1) -> dict[str, Any]:
    """OpenAI's ``usage``: tokens of the prompts, each counted once, and of all answers.

    Args:
        timings: of each choice, those of one prompt side by side.
        num_per_prompt: choices of each prompt.
    """
    firsts = timings[::num_per_prompt]
    num_prompt = sum(choice.num_prompt_tokens for choice in firsts)
    num_output = sum(choice.num_output_tokens for choice in timings)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        # The later choices of a prompt find in the cache what the first one read.
        "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in firsts)},
    }


def timing_figures(timings: Timings) -> dict[str, float]:
    """The ``timings`` extension: durations in ms, speeds in tokens per second, joules if measured; all finite."""
    num_prefilled = timings.num_prompt_tokens - timings.num_cached_tokens
    energy = {} if timings.energy_j is None else {"energy_j": round(timings.energy_j, 3)}
    return {
        "queue_ms": _ms(timings.queue_s),
        "ttft_ms": _ms(timings.ttft_s),
        "prefill_ms": _ms(timings.prefill_s),
        "prefill_tokens_per_second": _rate(num_prefilled, timings.prefill_s),
        "decode_ms": _ms(timings.decode_s),
        # The first token comes out of prefill.
        "decode_tokens_per_second": _rate(timings.num_output_tokens - 1, timings.decode_s),
        **energy,
    }


def error_body(error: QwedgeError) -> dict[str, Any]:
    """OpenAI's error shape, with ``hint`` and, where it makes sense, ``retry_after_ms`` beside its fields."""
    kind = "invalid_request_error" if isinstance(error, RequestError) and not error.retryable else "server_error"
    body: dict[str, Any] = {
        "message": error.message,
        "type": "rate_limit_error" if error.status == 429 else kind,
        "param": error.param,
        "code": error.code,
        "hint": error.hint or None,
    }
    if error.retry_after_s is not None:
        body["retry_after_ms"] = round(error.retry_after_s * 1000)
    return {"error": body}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if count > 0 and seconds > 0 else 0.0
