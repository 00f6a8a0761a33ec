"""From the service's events to the events of Anthropic's streams, and to the complete message."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from edge.anthropic.errors import error_body
from edge.anthropic.schemas import MessagesRequest
from edge.model import Model
from edge.openai import ChatRequest
from edge.openai.arguments import arguments_object
from edge.openai.choice import block_parser
from edge.openai.pieces import Arguments, Call, Content, Piece, Reasoning
from edge.service import Delta, Event, Failed, Finished, GenerationRequest, Queued

_EMPTY = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}
"""Kind of a block -> how it begins."""


class MessageWriter:
    """Takes the events of one request and gives the events of its stream, and in the end the complete message.

    Args:
        model: what answers.
        request: what the client sent.
        chat: what :func:`~edge.anthropic.translate.to_chat` made of it.
        generation: what :func:`~edge.openai.prepare` made of that.
    """

    def __init__(
        self, model: Model, request: MessagesRequest, chat: ChatRequest, generation: GenerationRequest
    ) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model_name = request.model or model.manifest.name
        self._num_prompt_tokens = len(generation.prompt_ids)
        self._parser = block_parser(model, chat, generation)
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False  # the last block
        self._arguments = ""  # of the last call, JSON text
        self._has_begun = False
        self._end: Finished | Failed | None = None

    def events(self, event: Event) -> Iterator[dict[str, Any]]:
        """The events to send for an event of the service; an error where the request failed."""
        if not self._has_begun:
            self._has_begun = True
            yield {"type": "message_start", "message": self._message(self._first_usage())}
        match event:
            case Queued():
                yield {"type": "ping"}
            case Delta(text):
                yield from self._add(self._parser.push(text))
            case Finished(text=text):
                yield from self._add([*self._parser.push(text), *self._parser.flush()])
                yield from self._close()
                self._end = event
                yield {"type": "message_delta", "delta": self._stop(), "usage": self._usage(event)}
                yield {"type": "message_stop"}
            case Failed(error):
                self._end = event
                yield error_body(error)

    def body(self) -> dict[str, Any]:
        """The complete message, after the end.

        Raises:
            QwedgeError: the request failed.
        """
        assert self._end is not None
        if isinstance(self._end, Failed):
            raise self._end.error
        return self._message(self._usage(self._end))

    def _add(self, pieces: list[Piece]) -> Iterator[dict[str, Any]]:
        for piece in pieces:
            match piece:
                case Content(text):
                    yield from self._add_text("text", text)
                case Reasoning(text):
                    yield from self._add_text("thinking", text)
                case Call():
                    yield from self._add_call(piece)
                case Arguments(text=text):
                    yield from self._add_arguments(text)

    def _add_text(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        if not self._is_open or self._blocks[-1]["type"] != kind:
            yield from self._open({"type": kind, **_EMPTY[kind]})
        self._blocks[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _add_call(self, call: Call) -> Iterator[dict[str, Any]]:
        yield from self._open({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        self._arguments = ""
        yield from self._add_arguments(call.arguments)

    def _add_arguments(self, text: str) -> Iterator[dict[str, Any]]:
        self._arguments += text
        if text:
            yield self._delta({"type": "input_json_delta", "partial_json": text})

    def _open(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._blocks.append(block)
        self._is_open = True
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._is_open:
            self._is_open = False
            if self._blocks[-1]["type"] == "tool_use":
                self._blocks[-1]["input"] = arguments_object(self._arguments)
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _message(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model_name,
            "content": list(self._blocks),
            **self._stop(),
            "usage": usage,
        }

    def _stop(self) -> dict[str, str | None]:
        """Why the message ended; null while it grows."""
        if not isinstance(self._end, Finished):
            return {"stop_reason": None, "stop_sequence": None}
        if self._end.reason == "length":
            reason = "max_tokens"
        elif self._end.matched_stop is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if any(block["type"] == "tool_use" for block in self._blocks) else "end_turn"
        return {"stop_reason": reason, "stop_sequence": self._end.matched_stop}

    def _first_usage(self) -> dict[str, int]:
        """Before it is known how much of the prompt is in the cache."""
        return _usage(self._num_prompt_tokens, 0, 0)

    def _usage(self, end: Finished) -> dict[str, int]:
        timings = end.timings
        return _usage(timings.num_prompt_tokens, timings.num_cached_tokens, timings.num_output_tokens)


def _usage(num_prompt: int, num_cached: int, num_output: int) -> dict[str, int]:
    return {
        "input_tokens": num_prompt - num_cached,  # Anthropic counts the others apart
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": num_output,
    }
