"""What stands in the payloads: protocol version 1 (docs/mqtt-protocol.md).

Each class is one message. The device reads :class:`Request` and writes the others; clients and tests may read them
with the same classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.errors import QwedgeError, RequestError
from edge.openai import error_body, parse_body
from edge.violations import violation

MAX_PAYLOAD_BYTES = 1 << 20
"""Largest request; a larger one is answered with 413."""
MAX_OUTCOME_BYTES = 4_000_000
"""Largest ``done``, below what the embedded broker takes; many log-probabilities of many choices may exceed it."""
MAX_DEADLINE_MS = 24 * 3600 * 1000

Milliseconds = Annotated[int, Field(ge=0)]
Status = Literal["online", "offline"]
"""Payload of the status topic: the bare word."""


class Message(BaseModel):
    """What all messages share; docs/schemas/mqtt has one JSON schema for each subclass."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    v: Annotated[int, Field(ge=1, le=1)] = 1
    """Protocol version: 1."""

    def encode(self) -> bytes:
        """The payload: JSON in UTF-8, without the fields that are None."""
        return self.model_dump_json(exclude_none=True).encode()


_Message = TypeVar("_Message", bound=Message)


class Request(Message):
    """Client to device: generate an answer."""

    body: dict[str, Any]
    """A chat completion request of OpenAI's API; a completion request if it has a ``prompt``, one for embeddings if it
    has an ``input``."""
    stream: bool | None = None
    """Whether to publish tokens as they come; without it, the body's ``stream`` decides."""
    deadline_ms: Annotated[int, Field(ge=1, le=MAX_DEADLINE_MS)] | None = None
    """Milliseconds from reception after which the request ends with 408."""
    attempt: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """How often the client sent this request, this time included; for its logs and ours."""


class Accepted(Message):
    """Device to client, on ``evt``: the request will be answered."""

    id: str
    event: Literal["accepted"] = "accepted"
    device: str
    """Who answers: cancel there."""
    duplicate: bool = False
    """True where the same request runs already: this copy shares its answer."""


class Queued(Message):
    """Device to client, on ``evt``: the request waits; sent again when it moves up."""

    id: str
    event: Literal["queued"] = "queued"
    position: Annotated[int, Field(ge=0)]
    """Requests ahead of it."""
    eta_ms: Milliseconds
    """Estimated time until it starts."""


class Started(Message):
    """Device to client, on ``evt``: the model reads the prompt."""

    id: str
    event: Literal["started"] = "started"


class Tokens(Message):
    """Device to client, on ``tok``: the next piece of the answer."""

    id: str
    seq: Annotated[int, Field(ge=0)]
    """0, 1, 2, ... without gaps: a gap is a lost batch, and ``done`` has the whole text."""
    index: Annotated[int, Field(ge=0)] = 0
    """Which of the answer's choices the text belongs to."""
    text: str
    reasoning: str | None = None
    """Text of the model's thinking; not part of the answer."""


class Usage(BaseModel):
    """Token counts, as in OpenAI's API."""

    model_config = ConfigDict(extra="allow", frozen=True)

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class Done(Message):
    """Device to client, on ``done``: the one outcome of a request."""

    id: str
    status: Annotated[int, Field(ge=200, le=599)]
    """As in HTTP: 200, 400, 404, 408, 409, 413, 429, 499 (cancelled), 500 or 503."""
    body: dict[str, Any]
    """What HTTP would have answered: OpenAI's response, or its error object."""
    usage: Usage | None = None
    retry_after_ms: Milliseconds | None = None
    """With 429 and 503: when to send the same request again."""
    replayed: bool = False
    """True where this answer was given before and the request was not run again."""

    @classmethod
    def failure(cls, request_id: str, error: QwedgeError) -> Done:
        """The outcome of a request that failed."""
        retry = None if error.retry_after_s is None else round(error.retry_after_s * 1000)
        return cls(id=request_id, status=error.status, body=error_body(error), retry_after_ms=retry)

    @classmethod
    def success(cls, request_id: str, body: dict[str, Any]) -> Done:
        """The outcome of a request that was answered with ``body``, an OpenAI response."""
        return cls(id=request_id, status=200, body=body, usage=Usage.model_validate(body["usage"]))


class ModelInfo(BaseModel):
    """A model that the device serves, by itself or with an adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    model_type: str
    context_length: int
    """Tokens of prompt and answer together."""


class Limits(BaseModel):
    """What the device accepts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slots: int
    """Requests that run at once."""
    max_queue: int
    """Requests that wait; one more gets 429."""
    max_payload_bytes: int


class Versions(BaseModel):
    """Versions of what runs on the device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    qwedge: str
    protocol: int
    mqtt: str
    """The version that the device itself speaks: ``5`` or ``3.1.1``. Clients may use either."""


class Info(Message):
    """Retained, on ``info``: what the device is."""

    device: str
    models: tuple[ModelInfo, ...]
    limits: Limits
    versions: Versions
    bundle: str | None = None
    """Name in the device's store of what is served, where it takes commands and has a store."""
    bundles: tuple[str, ...] | None = None
    """What it can be switched to."""
    problem: str | None = None
    """Why it does less than it should: it is in safe mode."""


class Load(Message):
    """Retained, on ``load``: how busy the device is; at most once a second and only when it changed."""

    slots: int
    busy: int
    """Requests that run."""
    queue: int
    """Requests that wait."""
    accepting: bool
    tokens_per_s: float
    """Decode speed of the latest answer over MQTT: what one stream can expect; 0 before the first."""
    temperature_c: float | None = None
    """Of the machine's hottest sensor, where it has one; told anew when it moved by 2 °C."""
    speed: float | None = None
    """The part of its full speed that the device works at, while it is slowed down."""
    slowed_by: Literal["heat", "power"] | None = None
    """Why it is slowed down."""


CommandStatus = Literal["init", "executing", "successful", "failed"]
"""The states of a command, in the words of thin-edge.io."""


class Command(Message):
    """Retained, on ``cmd``: a management command and its state. Clients write ``init``, the device all others."""

    status: CommandStatus
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """The bundle, for ``switch`` and ``verify``."""
    step: str | None = None
    """What is being done."""
    progress: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of the step."""
    error: dict[str, Any] | None = None
    """With ``failed``: OpenAI's error object."""


class RuleFailure(Message):
    """On a rule's ``error`` topic: a message got no answer."""

    rule: str
    topic: str
    """The message's topic."""
    status: Annotated[int, Field(ge=400, le=599)]
    error: dict[str, Any]
    """OpenAI's error object, as in the body of a failed ``done``."""

    @classmethod
    def of(cls, rule: str, topic: str, error: QwedgeError) -> RuleFailure:
        """Why a rule gave no answer to a message on ``topic``."""
        return cls(rule=rule, topic=topic, status=error.status, error=error_body(error)["error"])


def parse_request(payload: bytes) -> Request:
    """Read a JSON request.

    Raises:
        RequestError: it is no JSON object, or a field is unknown, missing or of the wrong type.
    """
    return _parse(Request, payload, '{"v":1,"body":{"messages":[...]}}')


def parse_command(payload: bytes) -> Command:
    """Read a command.

    Raises:
        RequestError: as :func:`parse_request`.
    """
    return _parse(Command, payload, '{"v":1,"status":"init","name":"BUNDLE"}')


def command_error(error: QwedgeError) -> dict[str, Any]:
    """The error object of a command that failed."""
    body: dict[str, Any] = error_body(error)["error"]
    return body


def _parse(kind: type[_Message], payload: bytes, example: str) -> _Message:
    try:
        return kind.model_validate(parse_body(payload))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"]))[:64]
        hint = f"send {example}; see docs/mqtt-protocol.md"
        raise RequestError(f"{param}: {violation(first['msg'])}", hint=hint, param=param) from None
