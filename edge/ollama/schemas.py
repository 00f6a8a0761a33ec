"""The fields of Ollama's requests that qwedge understands [1].

Unknown fields are accepted; what would change the answer but is not supported is refused with a hint.

[1] https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from edge.engine.logprobs import MAX_TOP
from edge.errors import RequestError
from edge.openai.schemas import MAX_MESSAGES, MAX_NAME, MAX_TOKENS, MAX_TOOLS
from edge.openai.wire import Unsupported, Wire, refuse_unsupported, validate

_LEAVE_OUT = "leave it out"
_UNSUPPORTED: Unsupported = {
    "images": (([],), "this model reads text: leave images out"),
    "template": (("",), "the bundle's own template is used; send raw to use none"),
    "context": (([],), "use /api/chat to go on with a conversation"),
}
_UNSUPPORTED_OPTIONS: Unsupported = {
    "mirostat": ((0,), "use temperature, top_p, top_k or min_p"),
    "tfs_z": ((1, 1.0), "use min_p"),
    "typical_p": ((1, 1.0), "use min_p"),
    # The penalties look at the whole text: Ollama's default of 64 tokens is taken for no wish.
    "repeat_last_n": ((-1, 64), _LEAVE_OUT),
}


class Options(Wire):
    """How to choose tokens, and how many; what concerns the loading of a model has no effect."""

    num_predict: Annotated[int, Field(ge=-(2**31), le=MAX_TOKENS)] | None = None
    """Most tokens of the answer; below 1: until the context is full."""
    num_ctx: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """Most tokens of prompt and answer together; never more than the served context."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            refuse_unsupported(value, _UNSUPPORTED_OPTIONS)
        return value


class Named(Wire):
    """A request that concerns one model."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class _Generation(Named):
    """Fields that chat and generate share."""

    options: Options | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    """JSON, or a schema that the answer is to follow."""
    stream: bool | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: int | float | str | None = None
    """How long the model stays in memory is this device's business: ``engine.sleep_after_s``."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces: where nothing is said, it does."""
        return self.stream is not False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to answer: then the model is to be loaded."""
        return False

    @property
    def given_options(self) -> Options:
        """The options, also where there are none."""
        return self.options or Options()


class Message(Wire):
    """A turn of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            refuse_unsupported(value, {"images": _UNSUPPORTED["images"]})
        return value


class ChatBody(_Generation):
    """Body of ``POST /api/chat``; without messages it loads the model."""

    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to answer."""
        return not self.messages


class GenerateBody(_Generation):
    """Body of ``POST /api/generate``; without a prompt it loads the model."""

    prompt: str | None = None
    suffix: str | None = None
    """What comes after the answer."""
    system: str | None = None
    raw: bool | None = None
    """Give the prompt to the model as it is, without the chat template."""

    @model_validator(mode="after")
    def _reports_of_chats_only(self) -> GenerateBody:
        if self.logprobs and (self.raw or self.suffix):
            hint = "leave raw and suffix out, or use /v1/completions"
            raise RequestError("logprobs do not go together with raw or suffix", hint=hint, param="logprobs")
        return self

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to answer."""
        return not self.prompt and not self.suffix


class EmbedBody(Named):
    """Body of ``POST /api/embed``."""

    input: str | list[str]
    truncate: bool | None = None
    """Cut a text off that is too long; unless this is false, that is what happens."""
    dimensions: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None


class EmbeddingsBody(Named):
    """Body of ``POST /api/embeddings``, the older one."""

    prompt: str

    @property
    def newer(self) -> EmbedBody:
        """The same as a body of the newer one."""
        return EmbedBody(model=self.model, input=self.prompt)


class ShowBody(Named):
    """Body of ``POST /api/show``."""

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "model" not in value and "name" in value:
            return {**value, "model": value["name"]}
        return value


_Body = TypeVar("_Body", bound=Named)


def parse(schema: type[_Body], body: Mapping[str, Any]) -> _Body:
    """Check a request's body.

    Raises:
        RequestError: a field is missing, of the wrong type, out of range or not supported; ``param`` names it.
    """
    refuse_unsupported(body, _UNSUPPORTED)
    request = validate(schema, body)
    if isinstance(request, _Generation) and request.is_empty and request.keep_alive in {0, "0", "0s"}:
        hint = "memory is given back after engine.sleep_after_s without requests"
        raise RequestError("the model cannot be unloaded by a request", hint=hint, param="keep_alive")
    return request
