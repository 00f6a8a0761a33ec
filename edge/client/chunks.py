"""From the chunks of an OpenAI stream to the whole answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edge.client.wire import Text

_HEAD = ("id", "created", "model")
_TEXTS = ("content", "reasoning_content", "text")


class ChunkMerger:
    """Collects the chunks of an answer with one choice."""

    def __init__(self) -> None:
        self._body: dict[str, Any] = {}
        self._choice: dict[str, Any] = {"index": 0}
        self._message: dict[str, Any] = {}
        self._is_chat = True
        self._num_pieces = 0

    def take(self, chunk: Mapping[str, Any]) -> Iterator[Text]:
        """Add a chunk; gives the text that it adds.

        Raises:
            LookupError, TypeError: it is none.
        """
        self._body |= {key: chunk[key] for key in (*_HEAD, "usage", "timings") if chunk.get(key) is not None}
        for choice in chunk["choices"]:
            self._is_chat = "delta" in choice
            part = choice.get("delta", choice)
            self._merge(part)
            self._choice["finish_reason"] = choice.get("finish_reason")
            self._merge_logprobs(choice.get("logprobs"))
            if text := part.get("content") or part.get("text"):
                yield Text(self._num_pieces, text)
                self._num_pieces += 1

    def body(self) -> dict[str, Any]:
        """The whole answer, as a request that is not streamed gets it."""
        if self._is_chat:
            content = self._message.get("content") or (None if "tool_calls" in self._message else "")
            message = {"role": "assistant", **self._message, "content": content}
            return {**self._body, "object": "chat.completion", "choices": [{**self._choice, "message": message}]}
        choice = {**self._choice, "text": self._message.get("text", "")}
        return {**self._body, "object": "text_completion", "choices": [choice]}

    def _merge(self, part: Mapping[str, Any]) -> None:
        for key in _TEXTS:
            if part.get(key):
                self._message[key] = self._message.get(key, "") + part[key]
        for call in part.get("tool_calls") or ():
            self._merge_call(call)

    def _merge_call(self, call: Mapping[str, Any]) -> None:
        """The first part of a call has all but the rest of its arguments."""
        calls = self._message.setdefault("tool_calls", [])
        if call["index"] < len(calls):
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        else:
            calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})

    def _merge_logprobs(self, logprobs: Mapping[str, list[Any]] | None) -> None:
        """Of chats and of completions alike, lists that go on."""
        if logprobs:
            known = self._choice.setdefault("logprobs", {})
            for key, values in logprobs.items():
                known.setdefault(key, []).extend(values or [])
