"""From the service's events to OpenAI's chunks and bodies."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from edge.errors import QwedgeError, RequestError
from edge.openai.blocks import BlockParser, Call, Content, Piece, Reasoning
from edge.openai.logprobs import Entry, LogprobsWriter, chat_logprobs, text_logprobs
from edge.openai.schemas import ChatRequest, CompletionRequest
from edge.sequence import Timings
from edge.service import Delta, Event, Failed, Finished, GenerationRequest, Model

_THINK_OPENED = "<think>\n"
_TAIL_TOKENS = 8
"""Tokens at a prompt's end that are enough to see whether the template opened a ``<think>`` block."""


class Answer:
    """Takes the events of one request and gives the chunks of its stream, and in the end the complete body.

    Args:
        model: what answers.
        request: what the client sent.
        generation: what :func:`~edge.openai.prepare.prepare` made of it.
    """

    def __init__(self, model: Model, request: ChatRequest | CompletionRequest, generation: GenerationRequest) -> None:
        self._shape: _Shape = _ChatShape() if isinstance(request, ChatRequest) else _TextShape()
        self._parser = _make_parser(model, request, generation)
        self._include_usage = request.include_usage
        self.id = f"{self._shape.id_prefix}-{uuid.uuid4().hex}"
        """The same in all chunks and in the body."""
        self._created = int(time.time())
        self._model_name = model.manifest.name
        self._pieces: list[Piece] = []
        self._logprobs = LogprobsWriter(model.tokenizer) if generation.num_logprobs is not None else None
        self._entries: list[Entry] = []
        self._num_told = 0  # of the entries, in chunks
        self._end: Finished | Failed | None = None

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks to send for an event; an error body where the request failed."""
        if isinstance(event, Delta):
            if self._logprobs is not None and event.logprobs is not None:
                self._entries.append(self._logprobs.entry(event.logprobs))
            return list(self._piece_chunks(self._parser.push(event.text)))
        if isinstance(event, Finished):
            self._end = event
            rest = [*self._parser.push(event.text), *self._parser.flush()]
            return [*self._piece_chunks(rest), *self._closing_chunks(event)]
        if isinstance(event, Failed):
            self._end = event
            return [error_body(event.error)]
        return []

    def body(self) -> dict[str, Any]:
        """The complete answer, after the terminal event.

        Raises:
            QwedgeError: the request failed.
        """
        assert self._end is not None
        if isinstance(self._end, Failed):
            raise self._end.error
        timings = self._end.timings
        return {
            **self._head(self._shape.body_object),
            "choices": [self._choice(self._shape.whole(self._pieces), self._finish_reason(self._end), self._entries)],
            "usage": usage(timings),
            "timings": timing_figures(timings),
        }

    def _piece_chunks(self, pieces: Iterable[Piece]) -> Iterator[dict[str, Any]]:
        for piece in pieces:
            delta = self._shape.delta(piece, first=not self._pieces)
            self._pieces.append(piece)
            yield self._chunk(delta, None)

    def _closing_chunks(self, end: Finished) -> Iterator[dict[str, Any]]:
        delta = self._shape.empty_delta(first=not self._pieces)
        yield {**self._chunk(delta, self._finish_reason(end)), "timings": timing_figures(end.timings)}
        if self._include_usage:
            yield {**self._head(self._shape.chunk_object), "choices": [], "usage": usage(end.timings)}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        no_usage_yet = {"usage": None} if self._include_usage else {}
        # A token whose text is held back travels with the next text.
        choice = self._choice(delta, finish_reason, self._entries[self._num_told :])
        self._num_told = len(self._entries)
        return {**self._head(self._shape.chunk_object), "choices": [choice], **no_usage_yet}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model_name}

    def _choice(self, part: dict[str, Any], finish_reason: str | None, entries: Sequence[Entry]) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._shape.logprobs(entries)
        return {"index": 0, **part, "logprobs": logprobs, "finish_reason": finish_reason}

    def _finish_reason(self, end: Finished) -> str:
        called = any(isinstance(piece, Call) for piece in self._pieces)
        return "tool_calls" if called and end.reason == "stop" else end.reason


def usage(timings: Timings) -> dict[str, Any]:
    """OpenAI's ``usage``: tokens of the prompt and of the answer."""
    return {
        "prompt_tokens": timings.num_prompt_tokens,
        "completion_tokens": timings.num_output_tokens,
        "total_tokens": timings.num_prompt_tokens + timings.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": timings.num_cached_tokens},
    }


def timing_figures(timings: Timings) -> dict[str, float]:
    """The ``timings`` extension: durations in ms, speeds in tokens per second; all finite."""
    num_prefilled = timings.num_prompt_tokens - timings.num_cached_tokens
    return {
        "queue_ms": _ms(timings.queue_s),
        "ttft_ms": _ms(timings.ttft_s),
        "prefill_ms": _ms(timings.prefill_s),
        "prefill_tokens_per_second": _rate(num_prefilled, timings.prefill_s),
        "decode_ms": _ms(timings.decode_s),
        # The first token comes out of prefill.
        "decode_tokens_per_second": _rate(timings.num_output_tokens - 1, timings.decode_s),
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


class _Shape(Protocol):
    """How pieces look on the wire."""

    id_prefix: str
    chunk_object: str
    body_object: str

    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """The part of a choice that carries ``piece``."""
        ...

    def empty_delta(self, *, first: bool) -> dict[str, Any]:
        """The part of a choice beside the finish reason."""
        ...

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The part of a choice that carries a complete answer."""
        ...

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Log-probabilities of tokens."""
        ...


class _ChatShape:
    id_prefix, chunk_object, body_object = "chatcmpl", "chat.completion.chunk", "chat.completion"

    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {"role": "assistant"} if first else {}
        match piece:
            case Content(text):
                fields["content"] = text
            case Reasoning(text):
                fields["reasoning_content"] = text
            case Call(index=index):
                fields["tool_calls"] = [{"index": index, **_tool_call(piece)}]
        return {"delta": fields}

    def empty_delta(self, *, first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""} if first else {}}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        calls = [_tool_call(piece) for piece in pieces if isinstance(piece, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return chat_logprobs(entries)


class _TextShape:
    id_prefix, chunk_object, body_object = "cmpl", "text_completion", "text_completion"

    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        del first  # text completions have no role
        return self.whole([piece])

    def empty_delta(self, *, first: bool) -> dict[str, Any]:
        del first
        return self.whole([])

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {"text": "".join(piece.text for piece in pieces if isinstance(piece, Content))}

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return text_logprobs(entries)


def _make_parser(model: Model, request: ChatRequest | CompletionRequest, generation: GenerationRequest) -> BlockParser:
    if isinstance(request, CompletionRequest):
        return BlockParser(reasoning=False, tools=False)
    if generation.grammar is not None:
        return BlockParser(reasoning=False, tools=generation.grammar.kind == "tool_call")
    tail = model.tokenizer.decode(generation.prompt_ids[-_TAIL_TOKENS:])
    return BlockParser(
        reasoning=request.thinking is not False,
        in_reasoning=tail.endswith(_THINK_OPENED),
        tools=bool(request.offered_tools),
    )


def _tool_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if count > 0 and seconds > 0 else 0.0
