"""The items of a response's output while they grow, and the events that tell of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from edge.openai.logprobs import Entry, chat_logprobs
from edge.openai.pieces import Call

Event = dict[str, Any]
Status = Literal["completed", "incomplete"]


class TextItem:
    """A message, or reasoning: an item with one part of text.

    Args:
        index: its place in the output.
        kind: of the item.
    """

    def __init__(self, index: int, kind: Literal["message", "reasoning"]) -> None:
        self.kind = kind
        self._name = "output_text" if kind == "message" else "reasoning_text"
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        prefix = "msg" if kind == "message" else "rs"
        own: Event = {"role": "assistant"} if kind == "message" else {"summary": []}
        self._item: Event = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, **own}
        self._place = {"item_id": self._item["id"], "output_index": index}

    def open(self) -> Iterator[Event]:
        """The item is there, still empty."""
        item = {**self._item, "status": "in_progress", "content": []}
        yield {"type": "response.output_item.added", "output_index": self._place["output_index"], "item": item}
        yield {"type": "response.content_part.added", **self._place, "content_index": 0, "part": self._part()}

    def add(self, text: str, entries: Sequence[Entry] = ()) -> Iterator[Event]:
        """More text.

        Args:
            text: what is added.
            entries: log-probabilities of the tokens of a message's text.
        """
        self._text += text
        told = chat_logprobs(entries)["content"]
        self._logprobs += told
        more = {"logprobs": told} if self.kind == "message" else {}
        yield {"type": f"response.{self._name}.delta", **self._place, "content_index": 0, "delta": text, **more}

    def close(self, status: Status) -> Iterator[Event]:
        """Nothing follows."""
        place = {**self._place, "content_index": 0}
        more = {"logprobs": self._logprobs} if self.kind == "message" else {}
        yield {"type": f"response.{self._name}.done", **place, "text": self._text, **more}
        yield {"type": "response.content_part.done", **place, "part": self._part()}
        self._item |= {"status": status, "content": [self._part()]}
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": self.whole()}

    def whole(self) -> Event:
        """The item as it stands in the response."""
        return dict(self._item)

    def _part(self) -> Event:
        more = {"annotations": [], "logprobs": list(self._logprobs)} if self.kind == "message" else {}
        return {"type": self._name, "text": self._text, **more}


class CallItem:
    """A function call.

    Args:
        index: its place in the output.
        call: what it begins with.
    """

    kind: Literal["function_call"] = "function_call"

    def __init__(self, index: int, call: Call) -> None:
        self._arguments = ""
        item_id = f"fc_{uuid.uuid4().hex}"
        self._item: Event = {"id": item_id, "type": self.kind, "call_id": call.id, "name": call.name}
        self._place = {"item_id": item_id, "output_index": index}

    def open(self) -> Iterator[Event]:
        """The call is there, without its arguments."""
        item = {**self._item, "arguments": "", "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": self._place["output_index"], "item": item}

    def add(self, text: str) -> Iterator[Event]:
        """More of the arguments."""
        if text:
            self._arguments += text
            yield {"type": "response.function_call_arguments.delta", **self._place, "delta": text}

    def close(self, status: Status) -> Iterator[Event]:
        """Nothing follows."""
        self._item |= {"arguments": self._arguments, "status": status}
        told = {"name": self._item["name"], "arguments": self._arguments}
        yield {"type": "response.function_call_arguments.done", **self._place, **told}
        index = self._place["output_index"]
        yield {"type": "response.output_item.done", "output_index": index, "item": self.whole()}

    def whole(self) -> Event:
        """The item as it stands in the response."""
        return dict(self._item)


Item = TextItem | CallItem
