"""From the service's events to the events of a response's stream, and to the complete response."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from edge.model import Model
from edge.openai.answer import timing_figures
from edge.openai.choice import block_parser
from edge.openai.logprobs import Entry, LogprobsWriter
from edge.openai.pieces import Arguments, Call, Content, Piece, Reasoning
from edge.openai.responses.items import CallItem, Item, TextItem
from edge.openai.responses.schemas import ResponseRequest
from edge.openai.schemas import ChatRequest
from edge.service import Delta, Event, Failed, Finished, GenerationRequest

Told = dict[str, Any]


class ResponseWriter:
    """Takes the events of one request and gives the events of its stream, and in the end the complete response.

    Args:
        model: what answers.
        request: what the client sent.
        chat: what :func:`~edge.openai.responses.translate.to_chat` made of it.
        generation: what :func:`~edge.openai.prepare` made of that.
    """

    def __init__(
        self, model: Model, request: ResponseRequest, chat: ChatRequest, generation: GenerationRequest
    ) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._request = request
        self._created_at = int(time.time())
        self._model_name = request.model or model.manifest.name
        self._sampling = generation.sampling
        self._parser = block_parser(model, chat, generation)
        self._logprobs = LogprobsWriter(model.tokenizer) if generation.num_logprobs is not None else None
        self._entries: list[Entry] = []  # of tokens whose text has not been told yet
        self._items: list[Item] = []
        self._is_open = False  # the last item
        self._num_reasoning_tokens = 0
        self._num_told = 0
        self._end: Finished | Failed | None = None

    def events(self, event: Event) -> Iterator[Told]:
        """The events to send for an event of the service, numbered."""
        for told in self._events(event):
            yield {**told, "sequence_number": self._num_told}
            self._num_told += 1

    def body(self) -> Told:
        """The complete response, after the end.

        Raises:
            QwedgeError: the request failed.
        """
        assert self._end is not None
        if isinstance(self._end, Failed):
            raise self._end.error
        return self._response()

    def _events(self, event: Event) -> Iterator[Told]:
        if self._num_told == 0:
            yield {"type": "response.created", "response": self._response()}
            yield {"type": "response.in_progress", "response": self._response()}
        match event:
            case Delta(text):
                if self._logprobs is not None and event.logprobs is not None:
                    self._entries.append(self._logprobs.answer(event.logprobs))
                pieces = self._parser.push(text)
                self._num_reasoning_tokens += self._parser.in_reasoning
                yield from self._add(pieces)
            case Finished(text=text):
                yield from self._finish(event, [*self._parser.push(text), *self._parser.flush()])
            case Failed():
                self._end = event
                yield {"type": "response.failed", "response": self._response()}

    def _finish(self, event: Finished, pieces: Iterable[Piece]) -> Iterator[Told]:
        yield from self._add(pieces)
        if not self._items:
            yield from self._open(TextItem(0, "message"))
        yield from self._close(is_cut=event.reason == "length")
        self._end = event
        kind = "incomplete" if event.reason == "length" else "completed"
        yield {"type": f"response.{kind}", "response": self._response()}

    def _add(self, pieces: Iterable[Piece]) -> Iterator[Told]:
        for piece in pieces:
            match piece:
                case Content(text):
                    entries, self._entries = self._entries, []
                    yield from self._add_text(TextItem(len(self._items), "message"), text, entries)
                case Reasoning(text):
                    self._entries = []
                    yield from self._add_text(TextItem(len(self._items), "reasoning"), text, [])
                case Call(arguments=text):
                    yield from self._open(CallItem(len(self._items), piece))
                    yield from self._add_arguments(text)
                case Arguments(text=text):
                    yield from self._add_arguments(text)

    def _add_text(self, new: TextItem, text: str, entries: list[Entry]) -> Iterator[Told]:
        """Add text to the open item, or to a new one where that is of another kind."""
        last = self._items[-1] if self._is_open else None
        if not isinstance(last, TextItem) or last.kind != new.kind:
            yield from self._open(new)
            last = new
        yield from last.add(text, entries)

    def _add_arguments(self, text: str) -> Iterator[Told]:
        self._entries = []
        call = self._items[-1]
        assert isinstance(call, CallItem)
        yield from call.add(text)

    def _open(self, item: Item) -> Iterator[Told]:
        yield from self._close()
        self._items.append(item)
        self._is_open = True
        yield from item.open()

    def _close(self, *, is_cut: bool = False) -> Iterator[Told]:
        if self._is_open:
            self._is_open = False
            yield from self._items[-1].close("incomplete" if is_cut else "completed")

    def _response(self) -> Told:
        request = self._request
        form = request.text.format if request.text else None
        reasoning = request.reasoning.effort if request.reasoning else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            **self._outcome(),
            "model": self._model_name,
            "output": [] if self._end is None else [item.whole() for item in self._items],
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning, "summary": None},
            "store": False,
            "background": False,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": _plain(request.tool_choice) or "auto",
            "tools": [{"strict": False, "parameters": None, **_plain(tool)} for tool in request.tools or ()],
            "truncation": "disabled",
        }

    def _outcome(self) -> Told:
        """How the response ended, or that it has not."""
        outcome: Told = {"status": "in_progress", "error": None, "incomplete_details": None, "usage": None}
        match self._end:
            case Failed(error):
                outcome |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
            case Finished(reason="length"):
                outcome |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
            case Finished():
                outcome["status"] = "completed"
        if isinstance(self._end, Finished):
            outcome |= {"usage": self._usage(self._end), "timings": timing_figures(self._end.timings)}
        return outcome

    def _usage(self, end: Finished) -> Told:
        timings = end.timings
        return {
            "input_tokens": timings.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": timings.num_cached_tokens},
            "output_tokens": timings.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": timings.num_prompt_tokens + timings.num_output_tokens,
        }


def _plain(value: Any) -> Any:
    """A part of the request as it was sent."""
    return value if value is None or isinstance(value, str) else value.model_dump(exclude_none=True)
