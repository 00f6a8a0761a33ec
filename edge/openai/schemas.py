"""The fields of requests that qwedge understands.

Unknown fields are accepted, as OpenAI's clients send more every year. A field that would change the answer but is not
supported is refused with a hint instead: nothing that a client asked for is silently left out. Ranges of the sampling
fields are checked by :class:`edge.engine.sampler.SamplingParams`, once for every front end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from edge.engine.logprobs import MAX_TOP
from edge.errors import RequestError
from edge.openai.prompts import Prompt, read_prompts
from edge.openai.wire import Unsupported, Wire, refuse_unsupported, validate

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_TOKENS = 2**31 - 1
MAX_CHOICES = 8
MAX_PROMPTS = 256
EFFORTS = {"none": 0, "minimal": 0, "low": 512, "medium": 2048, "high": -1, "xhigh": -1, "max": -1}
"""``reasoning_effort`` in tokens; -1 = no limit."""
MAX_NAME = 256
"""Characters of a model's name, or a function's."""

_UNSUPPORTED: Unsupported = {
    "best_of": ((1,), "leave it out"),
    "functions": ((), "use tools"),
    "function_call": (("none",), "use tool_choice"),
    "audio": ((), "this server answers with text"),
    "grammar": (("",), "use structured_outputs.grammar, in Lark's notation"),
    "json_schema": ((), "use response_format"),
    "use_beam_search": ((False,), "leave it out"),
}
_UNSUPPORTED_IN_CHAT = {
    **_UNSUPPORTED,
    "echo": ((False,), "use /v1/completions"),
    "suffix": (("",), "use /v1/completions"),
}


class StreamOptions(Wire):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None


class JsonSchema(Wire):
    """A named JSON schema; answers follow it, whether ``strict`` is set or not."""

    name: str | None = None
    strict: bool | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Wire):
    """Free text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_named(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            hint = "send json_schema with the type 'json_schema', and only then"
            param = "response_format.json_schema"
            raise RequestError("type and json_schema do not go together", hint=hint, param=param)
        return self


class StructuredOutputs(Wire):
    """vLLM's way to say what form an answer has; one of the fields."""

    model_config = ConfigDict(extra="forbid")

    definition: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    """A JSON schema."""
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    """In Lark's notation."""
    choice: Annotated[list[str], Field(min_length=1)] | None = None


class ToolFunction(Wire):
    """A function the model may call; the template shows all of its fields to the model."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""


class Tool(Wire):
    """A tool the model may call."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: ToolFunction


class FunctionName(Wire):
    """A function by its name."""

    name: str


class NamedTool(Wire):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class Sampling(Wire):
    """How tokens are chosen: fields that all requests share, under the names of the sampler's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None


SAMPLING_FIELDS = tuple(Sampling.model_fields)


class _Generation(Sampling):
    """Fields that chat and text completions share."""

    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool | None = None
    """Go on past the end of the answer, up to ``max_tokens``: for benchmarks, as vLLM and llama.cpp have it."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | None = None
    """The older names of ``structured_outputs``."""
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None

    @field_validator("stop")
    @classmethod
    def _bounded_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS:
            raise ValueError(f"has more than {MAX_STOPS} strings")
        if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise ValueError(f"must be strings of 1 to {MAX_STOP_CHARS} characters")
        return value

    @model_validator(mode="after")
    def _usage_of_streams_only(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream", hint="set stream to true", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage figures."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None = no limit given."""
        return self.max_tokens

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are wanted."""
        return False


class ChatRequest(_Generation):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    """The conversation; :class:`edge.chat.ChatTemplate` checks and normalises each message."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    """Most tokens of reasoning; -1 = no limit."""
    thinking_token_budget: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    """vLLM's name of ``thinking_budget``."""
    thinking_budget_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    """llama.cpp's name of ``thinking_budget``."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _known_choice(self) -> ChatRequest:
        if self.tool_choice is not None and self.tools is None:
            raise RequestError("tool_choice needs tools", hint="send tools or leave it out", param="tool_choice")
        if isinstance(self.tool_choice, NamedTool) and not self.forced_tools:
            raise RequestError("tool_choice names no tool", hint="name one of tools", param="tool_choice")
        return self

    @model_validator(mode="after")
    def _alternatives_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs", hint="set logprobs to true", param="top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token's log-probability; None = no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None = no limit given."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def offered_tools(self) -> list[Tool]:
        """Tools the model may call in this answer."""
        return [] if self.tools is None or self.tool_choice == "none" else self.tools

    @property
    def forced_tools(self) -> list[Tool]:
        """Tools of which the answer must call one; none where calls are free."""
        match self.tool_choice:
            case "required":
                return self.offered_tools
            case NamedTool(function=wanted):
                return [tool for tool in self.offered_tools if tool.function.name == wanted.name]
            case _:
                return []

    @property
    def insists_on_tools(self) -> bool:
        """Whether calls must be held to the schemas of their tools, or their number to one."""
        strict = any((tool.function.model_extra or {}).get("strict") is True for tool in self.offered_tools)
        return strict or self.parallel_tool_calls is False

    @property
    def thinking(self) -> bool | None:
        """Whether a reasoning model should think; None = the template's default."""
        if self.enable_thinking is not None:
            return self.enable_thinking
        if (value := (self.chat_template_kwargs or {}).get("enable_thinking")) is not None:
            return bool(value)
        if self.reasoning_effort is not None:
            return EFFORTS[self.reasoning_effort] != 0
        return None if self.thinking_limit is None else self.thinking_limit != 0

    @property
    def thinking_limit(self) -> int | None:
        """Most tokens of reasoning; None = no limit."""
        given = (self.thinking_budget, self.thinking_token_budget, self.thinking_budget_tokens)
        limit = next((value for value in given if value is not None), None)
        if limit is None and (value := (self.chat_template_kwargs or {}).get("thinking_budget")) is not None:
            limit = value if type(value) is int and value >= 0 else None
        if limit is None and self.reasoning_effort is not None:
            limit = EFFORTS[self.reasoning_effort]
        return None if limit == -1 else limit


class CompletionRequest(_Generation):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[Any]
    """Text, token ids, or a batch of such prompts."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    echo: bool | None = None
    """Put the prompt before the answer, in the text and in the log-probabilities."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    suffix: str | None = None
    """What follows the gap that the answer fills, after the prompt."""

    @model_validator(mode="after")
    def _gap_alone(self) -> CompletionRequest:
        if self.suffix and self.echo:
            raise RequestError("echo and suffix do not go together", hint="leave one of them out", param="echo")
        return self

    @model_validator(mode="after")
    def _something_to_answer(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            hint = "set echo to true to score the prompt, or max_tokens to at least 1"
            raise RequestError("max_tokens 0 leaves nothing to answer", hint=hint, param="max_tokens")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token's log-probability; None = no log-probabilities."""
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are wanted."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, each as text or as token ids.

        Raises:
            RequestError: one is empty, or neither text nor integers; or there are too many.
        """
        return read_prompts(self.prompt, "prompt", MAX_PROMPTS)


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Check the body of a chat request.

    Raises:
        RequestError: a field is missing, of the wrong type, out of range or not supported; ``param`` names it.
    """
    refuse_unsupported(body, _UNSUPPORTED_IN_CHAT)
    return validate(ChatRequest, body)


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """Check the body of a text completion.

    Raises:
        RequestError: a field is missing, of the wrong type, out of range or not supported; ``param`` names it.
    """
    refuse_unsupported(body, _UNSUPPORTED)
    return validate(CompletionRequest, body)
