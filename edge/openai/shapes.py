"""OpenAI's two shapes of a response: chat completions and text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from edge.openai.logprobs import Entry, chat_logprobs, text_logprobs
from edge.openai.pieces import Arguments, Call, Content, Piece, Reasoning, complete_calls
from edge.openai.schemas import ChatRequest, CompletionRequest


def shape_of(request: ChatRequest | CompletionRequest) -> Shape:
    """The shape of the response to a request."""
    return ChatShape() if isinstance(request, ChatRequest) else TextShape()


class Shape(Protocol):
    """How pieces look on the wire."""

    id_prefix: str
    chunk_object: str
    body_object: str
    lists_end: bool
    """Whether the log-probabilities list the token that ends the answer."""

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


class ChatShape:
    """Chat completions."""

    id_prefix, chunk_object, body_object = "chatcmpl", "chat.completion.chunk", "chat.completion"
    lists_end = False

    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """See :class:`Shape`."""
        fields: dict[str, Any] = {"role": "assistant"} if first else {}
        match piece:
            case Content(text):
                fields["content"] = text
            case Reasoning(text):
                fields["reasoning_content"] = text
            case Call(index=index):
                fields["tool_calls"] = [{"index": index, **_tool_call(piece)}]
            case Arguments(index, text):
                fields["tool_calls"] = [{"index": index, "function": {"arguments": text}}]
        return {"delta": fields}

    def empty_delta(self, *, first: bool) -> dict[str, Any]:
        """See :class:`Shape`."""
        return {"delta": {"role": "assistant", "content": ""} if first else {}}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See :class:`Shape`."""
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        calls = [_tool_call(call) for call in complete_calls(pieces)]
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See :class:`Shape`."""
        return chat_logprobs(entries)


class TextShape:
    """Text completions."""

    id_prefix, chunk_object, body_object = "cmpl", "text_completion", "text_completion"
    # Evaluation harnesses cut one token off the end of an echoed prompt's lists, whether it has a text or not.
    lists_end = True

    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """See :class:`Shape`."""
        del first  # text completions have no role
        return self.whole([piece])

    def empty_delta(self, *, first: bool) -> dict[str, Any]:
        """See :class:`Shape`."""
        del first
        return self.whole([])

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See :class:`Shape`."""
        return {"text": "".join(piece.text for piece in pieces if isinstance(piece, Content))}

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See :class:`Shape`."""
        return text_logprobs(entries)


def _tool_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
