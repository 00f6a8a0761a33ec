"""The fields of a request for a response that qwedge understands; others are accepted and have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from edge.engine.logprobs import MAX_TOP
from edge.openai.schemas import MAX_MESSAGES, MAX_NAME, MAX_TOKENS, MAX_TOOLS, Sampling
from edge.openai.wire import Unsupported, Wire, refuse_unsupported, validate

_SEND_ALL = "send the whole conversation as input: nothing is stored here"
_UNSUPPORTED: Unsupported = {
    "previous_response_id": ((), _SEND_ALL),
    "conversation": ((), _SEND_ALL),
    "background": ((False,), "leave it out and wait for the answer, or stream it"),
    "prompt": ((), "send instructions and input"),
    "truncation": (("disabled",), "shorten the input: nothing is left out of it here"),
    "max_tool_calls": ((), "tools run at the client; set parallel_tool_calls to false for one call at most"),
}


class FunctionTool(Wire):
    """A function the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None


class NamedFunction(Wire):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Wire):
    """Free text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    strict: bool | None = None
    definition: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(Wire):
    """The form of the text."""

    format: TextFormat | None = None


class ReasoningOptions(Wire):
    """How much a reasoning model thinks."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponseRequest(Sampling):
    """Body of ``POST /v1/responses``."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    """The user's text, or items: messages, calls, outputs of calls, reasoning."""
    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    instructions: str | None = None
    """The system prompt."""
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """Reasoning included."""
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    include: list[str] | None = None
    """``message.output_text.logprobs`` adds log-probabilities."""
    metadata: dict[str, str] | None = None
    """Comes back with the response."""
    stream: bool | None = None


def parse_response(body: Mapping[str, Any]) -> ResponseRequest:
    """Check the body of a request.

    Raises:
        RequestError: a field is missing, of the wrong type, out of range or not supported; ``param`` names it.
    """
    refuse_unsupported(body, _UNSUPPORTED)
    return validate(ResponseRequest, body)
