"""What OpenAI's paths answer, for the OpenAPI document alone: a test holds the answers to it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Part of an answer; it has no other fields."""

    model_config = ConfigDict(extra="forbid")


class Error(Part):
    """Why a request was refused or failed."""

    message: str
    type: str
    param: str | None = Field(description="The field that is at fault")
    code: str
    hint: str | None = Field(description="What to do about it")
    retry_after_ms: int | None = None


class ErrorBody(Part):
    """Every error."""

    error: Error


class Timings(Part):
    """Where the time went: milliseconds, and tokens per second."""

    queue_ms: float
    ttft_ms: float = Field(description="To the first token, the queue included")
    prefill_ms: float
    prefill_tokens_per_second: float
    decode_ms: float
    decode_tokens_per_second: float


class CachedTokens(Part):
    """Tokens that did not have to be read again."""

    cached_tokens: int


class ReasoningTokens(Part):
    """Tokens inside of the ``<think>`` block."""

    reasoning_tokens: int


class Usage(Part):
    """Tokens of prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None


class TokenLogprob(Part):
    """A token and how probable it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """The token that was taken, and the most probable ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Part):
    """Of a chat's answer."""

    content: list[ChosenLogprob]
    refusal: None


class CalledFunction(Part):
    """A function and its arguments."""

    name: str
    arguments: str = Field(description="JSON text")


class ToolCall(Part):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Part):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Part):
    """One answer of a chat."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    timings: Timings | None = Field(default=None, description="Where there are several choices")


class ChatCompletion(Part):
    """The answer of a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings | None = None


class TextLogprobs(Part):
    """Of a completion: lists side by side."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Part):
    """One continuation of a text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    timings: Timings | None = Field(default=None, description="Where there are several choices")


class TextCompletion(Part):
    """The answer of a completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    timings: Timings | None = None


class OutputText(Part):
    """A message's text."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChosenLogprob]


class ReasoningText(Part):
    """A text of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class MessageItem(Part):
    """A message of a response."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class ReasoningItem(Part):
    """Reasoning of a response."""

    id: str
    type: Literal["reasoning"]
    summary: list[Any]
    status: Literal["completed", "incomplete"]
    content: list[ReasoningText]


class CallItem(Part):
    """A function call of a response."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="JSON text")
    status: Literal["completed", "incomplete"]


class ResponseUsage(Part):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseFailure(Part):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Part):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseBody(Part):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[MessageItem | ReasoningItem | CallItem]
    usage: ResponseUsage | None
    timings: Timings | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    store: Literal[False]
    background: Literal[False]
    temperature: float
    top_p: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    truncation: Literal["disabled"]


class Embedding(Part):
    """The vector of an input."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Of length 1; base64 of 32-bit floats where that was asked for")


class EmbeddingUsage(Part):
    """Tokens of the inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Part):
    """The vectors of all inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class TokenPiece(Part):
    """A token and its text."""

    id: int
    piece: str | list[int] = Field(description="Bytes, where the token is a part of a character")


class TokenList(Part):
    """The tokens of a text."""

    tokens: list[int] | list[TokenPiece]
    count: int
    max_model_len: int = Field(description="Tokens that the context holds")
    token_strs: list[str] | None


class Text(Part):
    """The text of tokens, under both of its names."""

    content: str
    prompt: str


class Prompt(Part):
    """The text of a prompt."""

    prompt: str
