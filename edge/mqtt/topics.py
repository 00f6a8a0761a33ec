"""The topic layout: the one place that knows where a message goes (docs/mqtt-protocol.md, version 1).

::

    {root}/v1/dev/{device}/status                  retained: online | offline
    {root}/v1/dev/{device}/info                    retained: models, limits, versions
    {root}/v1/dev/{device}/load                    retained: slots, queue, speed
    {root}/v1/dev/{device}/req/{client}/{id}       a request for this device
    {root}/v1/dev/{device}/cancel/{client}/{id}    ends that request
    {root}/v1/dev/{device}/cmd/{type}/{id}         retained: a management command and its state
    {root}/v1/dev/{device}/prompt                  a prompt from Home Assistant
    {root}/v1/dev/{device}/rule/{name}/error       why a rule gave no answer
    {root}/v1/pool/{model}/req/{client}/{id}       a request for any device that serves the model and has room
    {root}/v1/res/{client}/{id}/evt|tok|done       progress, tokens, the one outcome
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from edge.errors import ConfigError, RequestError

PROTOCOL_VERSION: Final = 1
MAX_TOPIC_BYTES: Final = 1024
"""Longest response topic that is honoured; MQTT itself allows 65,535 bytes."""
SHARE_GROUP: Final = "qwedge"
"""The pool's subscriptions share their messages under this name."""
_SEGMENT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
_LEVEL = re.compile(r"[^+#$/\x00-\x20\x7f]+")


def is_segment(text: str) -> bool:
    """Whether ``text`` can be a device, client or request id: 1 to 64 of letters, digits, ``.``, ``_`` and ``-``."""
    return _SEGMENT.fullmatch(text) is not None


@dataclass(frozen=True)
class RequestId:
    """Names a request: the client and its own id for it. Two clients may use the same id."""

    client: str
    id: str

    def __post_init__(self) -> None:
        if not (is_segment(self.client) and is_segment(self.id)):
            hint = "use 1 to 64 letters, digits, '.', '_' and '-'"
            raise RequestError("the topic's client or id is not allowed", hint=hint, param="topic")


@dataclass(frozen=True)
class RequestTopic:
    """Parsed from ``.../req/{client}/{id}``, of the device or of a pool."""

    request: RequestId


@dataclass(frozen=True)
class CancelTopic:
    """Parsed from ``.../cancel/{client}/{id}``."""

    request: RequestId


@dataclass(frozen=True)
class CommandTopic:
    """Parsed from ``.../cmd/{type}/{id}``."""

    type: str
    id: str


@dataclass(frozen=True)
class ReplyTopics:
    """Where the messages of one answer go."""

    done: str
    """The outcome's topic; the raw text of a plain-text answer goes below it."""
    base: str
    """Parent of ``evt`` and ``tok``."""

    @property
    def evt(self) -> str:
        """Progress."""
        return f"{self.base}/evt"

    @property
    def tok(self) -> str:
        """Token batches."""
        return f"{self.base}/tok"

    @property
    def text(self) -> str:
        """The bare answer to a plain-text request."""
        return f"{self.done}/text"

    @property
    def error(self) -> str:
        """One bare line about the failure of a plain-text request."""
        return f"{self.done}/error"


@dataclass(frozen=True)
class Layout:
    """All topics of one device under one root."""

    root: str
    """First level(s) of every topic."""
    device: str

    def __post_init__(self) -> None:
        if not all(_LEVEL.fullmatch(level) for level in self.root.split("/")):
            raise ConfigError(f"the topic root {self.root!r} is not allowed", hint="plain levels, like plant7/llm")
        if not is_segment(self.device):
            raise ConfigError(f"the device name {self.device!r} is not allowed", hint="letters, digits, '.', '_', '-'")

    @property
    def status(self) -> str:
        """Retained ``online`` or ``offline``; also the last will's topic."""
        return f"{self._device}/status"

    @property
    def info(self) -> str:
        """Retained description of the device."""
        return f"{self._device}/info"

    @property
    def load(self) -> str:
        """Retained load of the device."""
        return f"{self._device}/load"

    @property
    def prompt(self) -> str:
        """Bare prompts of a client that can name no id: Home Assistant."""
        return f"{self._device}/prompt"

    @property
    def branch(self) -> str:
        """Parent of all topics of the protocol; what lies elsewhere is other people's."""
        return _base(self.root)

    def rule_error(self, name: str) -> str:
        """Where a rule tells why it gave no answer."""
        return f"{self._device}/rule/{name}/error"

    @property
    def filters(self) -> tuple[str, str]:
        """What the device subscribes to: requests and cancels."""
        return f"{self._device}/req/+/+", f"{self._device}/cancel/+/+"

    @property
    def commands(self) -> str:
        """What the device subscribes to for management commands."""
        return f"{self._device}/cmd/+/+"

    def command(self, kind: str, command_id: str) -> str:
        """The topic of one management command."""
        return f"{self._device}/cmd/{kind}/{command_id}"

    def parse_command(self, topic: str) -> CommandTopic:
        """Read the topic of a management command.

        Raises:
            RequestError: it is none of this device, or its type or id is not allowed.
        """
        kind, _, command_id = topic.removeprefix(f"{self._device}/cmd/").partition("/")
        if not (is_segment(kind) and is_segment(command_id)):
            raise RequestError("the topic's type or id is not allowed", param="topic")
        return CommandTopic(kind, command_id)

    def request(self, request: RequestId) -> str:
        """Where a client publishes a request."""
        return f"{self._device}/req/{request.client}/{request.id}"

    def cancel(self, request: RequestId) -> str:
        """Where a client cancels a request."""
        return f"{self._device}/cancel/{request.client}/{request.id}"

    def parse(self, topic: str) -> RequestTopic | CancelTopic:
        """What a topic that the device subscribes to stands for.

        Raises:
            RequestError: the topic is not of this device, or its client or id is not allowed.
        """
        verb, _, rest = self._below(topic).partition("/")
        client, _, request_id = rest.partition("/")
        match verb:
            case "req":
                return RequestTopic(RequestId(client, request_id))
            case "cancel":
                return CancelTopic(RequestId(client, request_id))
            case _:
                raise RequestError("the topic is none of this device", param="topic")

    def reply(self, request: RequestId, response_topic: str | None = None) -> ReplyTopics:
        """Where the answer to a request goes: below ``res/{client}/{id}``, or to an MQTT 5 response topic.

        Raises:
            RequestError: the response topic is outside the client's own branch. Otherwise a client could make the
                device publish anywhere.
        """
        branch = f"{_base(self.root)}/res/{request.client}"
        if response_topic is None:
            return ReplyTopics(done=f"{branch}/{request.id}/done", base=f"{branch}/{request.id}")
        levels = response_topic.removeprefix(f"{branch}/")
        short = len(response_topic.encode("utf-8", errors="replace")) <= MAX_TOPIC_BYTES
        if levels == response_topic or not short or not all(_LEVEL.fullmatch(level) for level in levels.split("/")):
            hint = f"use a response topic below {branch}/, or none"
            raise RequestError("the response topic is not allowed", hint=hint, param="response_topic")
        return ReplyTopics(done=response_topic, base=response_topic)

    def _below(self, topic: str) -> str:
        """What follows the device, or the model of a pool."""
        pools = f"{_base(self.root)}/pool/"
        if topic.startswith(pools):
            return topic.removeprefix(pools).partition("/")[2]
        return topic.removeprefix(f"{self._device}/")

    @property
    def _device(self) -> str:
        return f"{_base(self.root)}/dev/{self.device}"


def pool_filter(root: str, model: str) -> str:
    """The subscription by which the members of a model's pool share its requests."""
    return f"$share/{SHARE_GROUP}/{_pool(root, model)}/req/+/+"


def pool_request(root: str, model: str, request: RequestId) -> str:
    """Where a client publishes a request that any member of the model's pool may answer."""
    return f"{_pool(root, model)}/req/{request.client}/{request.id}"


def answers_filter(root: str, client: str) -> str:
    """The subscription by which a client gets all its answers."""
    return f"{_base(root)}/res/{client}/#"


def devices_filter(root: str, kind: Literal["status", "info", "load"]) -> str:
    """The subscription by which a client learns what all devices say about themselves."""
    return f"{_base(root)}/dev/+/{kind}"


def _pool(root: str, model: str) -> str:
    if _MODEL.fullmatch(model) is None:
        raise ConfigError(f"the model name {model!r} is not allowed", hint="the name in the device's `info`")
    return f"{_base(root)}/pool/{model}"


def _base(root: str) -> str:
    return f"{root}/v{PROTOCOL_VERSION}"
