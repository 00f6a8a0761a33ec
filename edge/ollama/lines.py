"""From the service's events to the lines of Ollama's streams, and to the complete answer."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from edge.model import Model
from edge.ollama.errors import error_body
from edge.ollama.schemas import ChatBody, GenerateBody
from edge.openai import ChatRequest, CompletionRequest
from edge.openai.arguments import arguments_object
from edge.openai.choice import Choice
from edge.sequence import Timings
from edge.service import Event, Failed, GenerationRequest

_NS = 1_000_000_000


class LineWriter:
    """Takes the events of one request and gives the lines of its stream, and in the end the complete answer.

    Args:
        model: what answers.
        request: what the client sent.
        wanted: what :func:`~edge.ollama.translate.to_openai` made of it.
        generation: what :func:`~edge.ollama.translate.generation_of` made of that.
    """

    def __init__(
        self,
        model: Model,
        request: ChatBody | GenerateBody,
        wanted: ChatRequest | CompletionRequest,
        generation: GenerationRequest,
    ) -> None:
        self._model_name = request.model
        self._is_chat = isinstance(request, ChatBody)
        self._choice = Choice(model, wanted, generation, index=0)
        self._failure: Failed | None = None

    def events(self, event: Event) -> Iterator[dict[str, Any]]:
        """The lines to send for an event of the service; an error where the request failed."""
        if isinstance(event, Failed):
            self._failure = event
            yield error_body(event.error)
            return
        for part in self._choice.parts(event):
            if self._choice.end is None:
                if said := _said(part.get("delta", part)):
                    yield self._line(said, part["logprobs"])
            else:
                # A call is told when it is complete.
                calls = _calls(self._choice.whole().get("message", {}))
                if calls:
                    yield self._line({"tool_calls": calls}, None)
                yield self._line({}, part["logprobs"]) | self._ending()

    def body(self) -> dict[str, Any]:
        """The complete answer, after the end.

        Raises:
            QwedgeError: the request failed.
        """
        if self._failure is not None:
            raise self._failure.error
        whole = self._choice.whole()
        message = whole.get("message", whole)
        calls = _calls(message)
        said = _said(message) | ({"tool_calls": calls} if calls else {})
        return self._line(said, whole["logprobs"]) | self._ending()

    def _line(self, said: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        line = _head(self._model_name) | _speech(said, is_chat=self._is_chat) | {"done": False}
        return line | ({"logprobs": logprobs["content"]} if logprobs and logprobs.get("content") else {})

    def _ending(self) -> dict[str, Any]:
        assert self._choice.end is not None
        return {"done": True, "done_reason": self._choice.end.reason, **_durations(self._choice.end.timings)}


def loaded(request: ChatBody | GenerateBody) -> dict[str, Any]:
    """The answer to a request that only wants the model in memory."""
    speech = _speech({}, is_chat=isinstance(request, ChatBody))
    return _head(request.model) | speech | {"done": True, "done_reason": "load"}


def _durations(timings: Timings) -> dict[str, int]:
    """Ollama's counts, and durations in ns; what was waited for counts as loading."""
    return {
        "total_duration": _ns(timings.queue_s + timings.prefill_s + timings.decode_s),
        "load_duration": _ns(timings.queue_s),
        "prompt_eval_count": timings.num_prompt_tokens,
        "prompt_eval_duration": _ns(timings.prefill_s),
        "eval_count": timings.num_output_tokens,
        "eval_duration": _ns(timings.decode_s),
    }


def _head(model_name: str) -> dict[str, Any]:
    return {"model": model_name, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


def _speech(said: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
    if is_chat:
        return {"message": {"role": "assistant", "content": "", **said}}
    thinking = {"thinking": said["thinking"]} if "thinking" in said else {}
    return {"response": said.get("content", ""), **thinking}


def _said(part: dict[str, Any]) -> dict[str, str]:
    """Text and thoughts of a part of OpenAI's answer, be it of a chat or of a completion."""
    content = part.get("content") or part.get("text")
    thinking = part.get("reasoning_content")
    return ({"content": content} if content else {}) | ({"thinking": thinking} if thinking else {})


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": call["id"],
            "function": {
                "index": index,
                "name": call["function"]["name"],
                "arguments": arguments_object(call["function"]["arguments"]),
            },
        }
        for index, call in enumerate(message.get("tool_calls", ()))
    ]


def _ns(seconds: float) -> int:
    return round(seconds * _NS)
