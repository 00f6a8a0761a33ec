"""One of a response's choices: from the events of its sequence to its parts of chunks and of the body."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from edge.engine.logprobs import TokenLogprobs
from edge.model import Model
from edge.openai.blocks import BlockParser, CallReader
from edge.openai.json_calls import JsonCallReader
from edge.openai.logprobs import Entry, LogprobsWriter
from edge.openai.pieces import Call, Piece
from edge.openai.schemas import ChatRequest, CompletionRequest
from edge.openai.shapes import shape_of
from edge.openai.thinking import opens_thinking
from edge.openai.xml_calls import XmlCallReader
from edge.service import Delta, Event, Finished, GenerationRequest, PromptScored


class Choice:
    """Collects one answer.

    Args:
        model: what answers.
        request: what the client sent.
        generation: what this choice was made of.
        index: its place among the response's choices.
    """

    def __init__(
        self, model: Model, request: ChatRequest | CompletionRequest, generation: GenerationRequest, index: int
    ) -> None:
        self.end: Finished | None = None
        """How the answer ended; None while it grows."""
        self._index = index
        self._shape = shape_of(request)
        self._parser = block_parser(model, request, generation)
        self._first_id = generation.prompt_ids[0]
        self._prefix = _echo(model, request, generation)
        self._pieces: list[Piece] = []
        self._logprobs = LogprobsWriter(model.tokenizer) if generation.num_logprobs is not None else None
        self._entries: list[Entry] = []
        self._num_told = 0  # of the entries, in chunks
        self.num_reasoning_tokens = 0
        """Tokens inside of the ``<think>`` block."""

    def echo_scores(self, event: PromptScored) -> None:
        """Take the log-probabilities of the echoed prompt; they come before the answer's."""
        if self._logprobs is not None:
            self._entries += self._logprobs.prompt(self._first_id, event.logprobs)

    def parts(self, event: Event) -> Iterator[dict[str, Any]]:
        """What the chunks for an event say about this choice; with the last of them, :attr:`end` is set."""
        if isinstance(event, Delta):
            self._collect(event.logprobs)
            pieces = self._parser.push(self._take_prefix() + event.text)
            self.num_reasoning_tokens += self._parser.in_reasoning
            yield from self._piece_parts(pieces)
        elif isinstance(event, Finished):
            self._collect(event.logprobs if self._shape.lists_end else None)
            text = self._take_prefix() + event.text
            yield from self._piece_parts([*self._parser.push(text), *self._parser.flush()])
            self.end = event
            yield self._part(self._shape.empty_delta(first=not self._pieces), self._new_entries())

    def whole(self) -> dict[str, Any]:
        """The complete choice, once it has ended."""
        return self._part(self._shape.whole(self._pieces), self._entries)

    def _collect(self, logprobs: TokenLogprobs | None) -> None:
        """Take the log-probabilities of the answer's next token, where there are any."""
        if self._logprobs is not None and logprobs is not None:
            self._entries.append(self._logprobs.answer(logprobs))

    def _take_prefix(self) -> str:
        """An echoed prompt, before the first text of the answer."""
        prefix, self._prefix = self._prefix, ""
        return prefix

    def _piece_parts(self, pieces: Iterable[Piece]) -> Iterator[dict[str, Any]]:
        for piece in pieces:
            delta = self._shape.delta(piece, first=not self._pieces)
            self._pieces.append(piece)
            yield self._part(delta, self._new_entries())

    def _new_entries(self) -> list[Entry]:
        """Those not told yet: a token whose text is held back travels with the next text."""
        entries = self._entries[self._num_told :]
        self._num_told = len(self._entries)
        return entries

    def _part(self, text: dict[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._shape.logprobs(entries)
        return {"index": self._index, **text, "logprobs": logprobs, "finish_reason": self._finish_reason()}

    def _finish_reason(self) -> str | None:
        if self.end is None:
            return None
        called = any(isinstance(piece, Call) for piece in self._pieces)
        return "tool_calls" if called and self.end.reason == "stop" else self.end.reason


def _echo(model: Model, request: ChatRequest | CompletionRequest, generation: GenerationRequest) -> str:
    """The prompt as its tokens spell it, so that the offsets of the tokens point into it; empty where unwanted."""
    if isinstance(request, ChatRequest) or not request.echo:
        return ""
    return model.tokenizer.decode(generation.prompt_ids, skip_special=False)


def block_parser(model: Model, request: ChatRequest | CompletionRequest, generation: GenerationRequest) -> BlockParser:
    """What splits the answer to a request into content, reasoning and tool calls."""
    if isinstance(request, CompletionRequest):
        return BlockParser(reasoning=False, tools=False)
    grammar, thinking = generation.grammar, generation.thinking
    is_form = grammar is not None and not grammar.leaves_text
    return BlockParser(
        reasoning=thinking is not None or (request.thinking is not False and not is_form),
        in_reasoning=opens_thinking(model, generation.prompt_ids),
        tools=bool(request.offered_tools),
        calls=_call_reader(model, request),
    )


def _call_reader(model: Model, request: ChatRequest) -> Callable[[int], CallReader]:
    if model.template is None or model.template.tool_form == "json":
        return JsonCallReader
    functions = (tool.function for tool in request.offered_tools)
    return partial(XmlCallReader, schemas={function.name: function.parameters or {} for function in functions})
