"""What Anthropic's and Ollama's paths answer, for the OpenAPI document alone: a test holds the answers to it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from edge.http.answer_schemas import ChosenLogprob, Part


class AnthropicProblem(Part):
    """Why a request was refused or failed."""

    type: str
    message: str = Field(description="With the hint")
    code: str
    param: str | None
    hint: str | None


class AnthropicError(Part):
    """Every error of Anthropic's paths."""

    type: Literal["error"]
    error: AnthropicProblem


class TextBlock(Part):
    """Text for the reader."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Part):
    """What the model thought first."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(Part):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Part):
    """Tokens of prompt and answer."""

    input_tokens: int = Field(description="Of the prompt, as far as they had to be read")
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(Part):
    """What the model says."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Part):
    """Tokens of a prompt."""

    input_tokens: int


class OllamaError(Part):
    """Every error of Ollama's paths."""

    error: str
    code: str


class OllamaFunction(Part):
    """A function and its arguments."""

    index: int
    name: str
    arguments: dict[str, Any]


class OllamaCall(Part):
    """A call of a tool."""

    id: str
    function: OllamaFunction


class OllamaMessage(Part):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None


class OllamaEnding(Part):
    """What chats and generated answers have in common; counts and durations are missing where a model was loaded."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"]
    logprobs: list[ChosenLogprob] | None = None
    total_duration: int | None = Field(default=None, description="Nanoseconds, like all durations")
    load_duration: int | None = Field(default=None, description="What was waited for")
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaChat(OllamaEnding):
    """An answer of ``/api/chat`` in one piece."""

    message: OllamaMessage


class OllamaAnswer(OllamaEnding):
    """An answer of ``/api/generate`` in one piece."""

    response: str
    thinking: str | None = None


class OllamaVectors(Part):
    """A vector of length 1 for each text."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaVector(Part):
    """A vector of length 1."""

    embedding: list[float]
