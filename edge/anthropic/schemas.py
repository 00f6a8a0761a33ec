"""The fields of Anthropic's requests that qwedge understands [1].

Unknown fields are accepted; what would change the answer but is not supported is refused with a hint.

[1] https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edge.errors import RequestError
from edge.openai.schemas import MAX_MESSAGES, MAX_NAME, MAX_STOP_CHARS, MAX_STOPS, MAX_TOKENS, MAX_TOOLS
from edge.openai.wire import Unsupported, Wire, refuse_unsupported, validate

_UNSUPPORTED: Unsupported = {
    "mcp_servers": (([],), "connect the servers in the client, and send their tools"),
    "container": ((), "leave it out"),
    "output_format": ((), "use output_config.format"),
}
_TEXT_BLOCKS = ("text",)
_BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


def _check_blocks(content: Any, known: tuple[str, ...]) -> Any:
    """Refuse blocks that no text model can read, in words of their own."""
    for block in content if isinstance(content, list) else ():
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in ("image", "document", "file"):  # the kind may be a list, which no set takes
            hint = "this model reads text: leave images and documents out"
            raise RequestError("images and documents are not supported", hint=hint, param="messages")
        if isinstance(kind, str) and kind not in known:
            hint = f"use blocks of type {', '.join(known)} here"
            raise RequestError("a content block has an unknown type", hint=hint, param="messages")
    return content


class Text(Wire):
    """Text."""

    type: Literal["text"]
    text: str


class ToolUse(Wire):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    input: dict[str, Any]


class ToolResult(Wire):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Text] | None = None
    is_error: bool | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return _check_blocks(value, _TEXT_BLOCKS)


class Thought(Wire):
    """What the model thought before it answered."""

    type: Literal["thinking"]
    thinking: str


class RedactedThought(Wire):
    """Thoughts that nobody can read; left out."""

    type: Literal["redacted_thinking"]


Block = Annotated[Text | ToolUse | ToolResult | Thought | RedactedThought, Field(discriminator="type")]


class Message(Wire):
    """A turn of the conversation; a last one of the assistant's is continued."""

    role: Literal["user", "assistant"]
    content: str | list[Block]

    @field_validator("content", mode="before")
    @classmethod
    def _known_blocks(cls, value: Any) -> Any:
        return _check_blocks(value, _BLOCKS)


class Tool(Wire):
    """A tool the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    description: str | None = None
    input_schema: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _of_the_client(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in (None, "custom"):
            hint = "this device runs no tools itself: describe the tool by an input_schema and run it in the client"
            raise RequestError("a tool is not of type 'custom'", hint=hint, param="tools")
        return value


class ToolChoice(Wire):
    """Which tools the model may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    """Of the tool that must be called, with type ``tool``."""
    disable_parallel_tool_use: bool | None = None


class Thinking(Wire):
    """Whether a reasoning model thinks before it answers; without this it does not."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None


class OutputFormat(Wire):
    """JSON by a schema."""

    type: Literal["json_schema"]
    definition: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Wire):
    """The form of the answer, and how much goes into it."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """How long a model that thinks does so, where ``thinking`` names no budget."""


class CountRequest(Wire):
    """Body of ``POST /v1/messages/count_tokens``: what becomes the prompt."""

    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    system: str | list[Text] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @field_validator("system", mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return _check_blocks(value, _TEXT_BLOCKS)

    @model_validator(mode="after")
    def _known_choice(self) -> CountRequest:
        choice, names = self.tool_choice, {tool.name for tool in self.tools or ()}
        if choice is None or choice.type == "none":
            return self
        if not names:
            raise RequestError("tool_choice needs tools", hint="send tools or leave it out", param="tool_choice")
        if choice.type == "tool" and choice.name not in names:
            raise RequestError("tool_choice names no tool", hint="name one of tools", param="tool_choice.name")
        return self


class MessagesRequest(CountRequest):
    """Body of ``POST /v1/messages``."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
            Field(max_length=MAX_STOPS),
        ]
        | None
    ) = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> MessagesRequest:
        budget = self.thinking.budget_tokens if self.thinking else None
        if budget is not None and budget >= self.max_tokens:
            hint = "max_tokens counts the thoughts too: make it larger than thinking.budget_tokens"
            raise RequestError("the thinking budget leaves no answer", hint=hint, param="thinking.budget_tokens")
        return self


def parse_messages(body: Mapping[str, Any]) -> MessagesRequest:
    """Check the body of a request for a message.

    Raises:
        RequestError: a field is missing, of the wrong type, out of range or not supported; ``param`` names it.
    """
    refuse_unsupported(body, _UNSUPPORTED)
    return validate(MessagesRequest, body)


def parse_count(body: Mapping[str, Any]) -> CountRequest:
    """Check the body of a request for a count of tokens.

    Raises:
        RequestError: see :func:`parse_messages`.
    """
    refuse_unsupported(body, _UNSUPPORTED)
    return validate(CountRequest, body)
