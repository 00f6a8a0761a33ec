"""Rules: from a message that knows nothing of prompts to a chat request, and to the topic of its answer.

A :class:`Rule` is what a ``[[mqtt.rule]]`` table says, checked and compiled. It holds no state: ``rules_gate`` decides
which messages count, ``rules_runner`` runs them. Prompts come from the configuration alone; a message fills in values,
within limits, and no text of it can become a special token (:mod:`edge.chat`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import minijinja

from edge.errors import ConfigError, EngineError, RequestError, TooLargeError
from edge.model import Model
from edge.mqtt.rules_topics import match, overlap
from edge.mqtt.topics import MAX_TOPIC_BYTES, Layout
from edge.openai import parse_chat, parse_json, prepare
from edge.settings.mqtt import MqttSettings
from edge.settings.rules import RuleSettings

FUEL: Final = 200_000
"""Template instructions for one rendering."""
MAX_PROMPT_BYTES: Final = 1 << 20
"""Longest rendered prompt: as large as the largest request."""
MAX_SCHEMA_BYTES: Final = 1 << 20
_TEMPLATE_FAILURES: Final = {
    "UndefinedError": "the payload lacks a value that the template needs",
    "OutOfFuel": "the payload takes the template too much work",
}
_VARIABLES: Final = ("payload", "json", "topic", "levels", "captures")
_PLACEHOLDER = re.compile(r"\{(\d)\}")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LEVEL = re.compile(r"[^+#\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True)
class RuleMessage:
    """A message that a rule takes."""

    topic: str
    payload: bytes | None
    """None where it was too large to be kept."""


class Rule:
    """A checked and compiled rule.

    Args:
        settings: its table.
        branch: where the protocol's own topics lie, which no rule publishes to.

    Raises:
        ConfigError: the template is malformed or uses unknown variables, the schema's file cannot be read, or the
            answers would go to the protocol's own topics.
    """

    def __init__(self, settings: RuleSettings, branch: str) -> None:
        self.settings = settings
        self.schema = _read_schema(settings)
        """The answer's JSON schema; None for free text and for choices."""
        self.publish_filter = _publish_filter(settings)
        """Matches every topic that the rule can publish to; here ``#`` may stand anywhere."""
        self._branch = f"{branch}/"
        self._environment = _environment(settings)
        if overlap(self.publish_filter, f"{branch}/#"):
            hint = "publish to topics of your own"
            raise ConfigError(f"the rule {settings.name!r} could publish below {branch}", hint=hint)

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.settings.name

    def captures(self, topic: str) -> tuple[str, ...] | None:
        """What the filter's wildcards stand for in a topic; None where its messages are not for this rule."""
        return None if topic.startswith(self._branch) else match(self.settings.subscribe, topic)

    def request(self, prompt: str) -> dict[str, Any]:
        """The chat request for a rendered prompt."""
        settings = self.settings
        opening = [{"role": "system", "content": settings.system}] if settings.system else []
        return {
            "messages": [*opening, {"role": "user", "content": prompt}],
            "max_tokens": settings.max_tokens,
            # A machine waits for the answer; thoughts would use up its tokens.
            "enable_thinking": False,
            **({"model": settings.model} if settings.model is not None else {}),
            **settings.sampling,
            **self._form(),
        }

    def render(self, message: RuleMessage) -> str:
        """The prompt for a message on a topic that the rule takes.

        Raises:
            TooLargeError: the payload or the prompt is larger than allowed.
            RequestError: the payload is no text, or the template needs something that it lacks.
        """
        text = _text(message.payload, self.settings.max_payload_bytes)
        variables: dict[str, Any] = {
            "payload": text,
            "topic": message.topic,
            "levels": message.topic.split("/"),
            "captures": self.captures(message.topic),
        }
        with contextlib.suppress(RequestError):  # left undefined then: a template that needs it fails
            variables["json"] = parse_json(text.encode())
        try:
            prompt = self._environment.render_template(self.name, **variables)
        except minijinja.TemplateError as error:
            # The kind alone: a detail may quote the payload.
            reason = _TEMPLATE_FAILURES.get(error.kind, f"the template failed ({error.kind})")
            raise RequestError(reason, hint="see the rule's prompt", param="prompt") from None
        if len(prompt.encode()) > MAX_PROMPT_BYTES:
            raise TooLargeError(f"the prompt is larger than {MAX_PROMPT_BYTES} bytes", hint="see the rule's template")
        if not prompt.strip():
            raise RequestError("the prompt is empty", hint="see the rule's template", param="prompt")
        return prompt

    def output_topic(self, topic: str) -> str:
        """Where the answer to a message on ``topic`` goes, which the rule takes.

        Raises:
            RequestError: the topic that comes out is not allowed, or would come back to this rule.
        """
        captures = self.captures(topic)
        assert captures is not None
        output = _PLACEHOLDER.sub(lambda found: captures[int(found[1]) - 1], self.settings.publish)
        fits = len(output.encode("utf-8", errors="replace")) <= MAX_TOPIC_BYTES and not output.startswith("$")
        if not fits or not all(_LEVEL.fullmatch(level) for level in output.split("/")):
            hint = "a capture is empty, too long, or holds what no topic may"
            raise RequestError("the answer's topic is not allowed", hint=hint, param="publish")
        if output.startswith(self._branch) or self.captures(output) is not None:
            hint = "publish to a topic that the rule's filter does not match"
            raise RequestError("the answer would come back to the rule", hint=hint, param="publish")
        return output

    def read(self, body: Mapping[str, Any]) -> str:
        """The text to publish, of the response to :meth:`request`.

        Raises:
            EngineError: the answer is empty, or was cut off before its form was complete.
        """
        choice = body["choices"][0]
        text = str(choice["message"]["content"] or "")
        constrained = self.schema is not None or self.settings.choices is not None
        if constrained and choice["finish_reason"] != "stop":
            raise EngineError("the answer was cut off before its form was complete", hint="raise the rule's max_tokens")
        if not text.strip():
            # An empty payload would also remove what a retained topic holds.
            raise EngineError("the answer is empty", hint="change the rule's prompt")
        return text

    def _form(self) -> dict[str, Any]:
        """The request's fields for the form of the answer."""
        if self.settings.choices is not None:
            return {"structured_outputs": {"choice": list(self.settings.choices)}}
        if self.schema is None:
            return {}
        return {"response_format": {"type": "json_schema", "json_schema": {"name": self.name, "schema": self.schema}}}


def load_rules(settings: MqttSettings) -> tuple[Rule, ...]:
    """The configured rules.

    Raises:
        ConfigError: one of them is not usable (see :class:`Rule`), or answers could lead back to the rule they are of.
    """
    branch = Layout(settings.root, settings.device).branch
    rules = tuple(Rule(rule, branch) for rule in settings.rule)
    for rule in rules:
        _refuse_circle(rule, rules)
    return rules


def check_with(model: Model, rules: Sequence[Rule]) -> None:
    """Check what only the model knows: its name and adapters, the ranges of sampling, the grammars.

    Raises:
        ConfigError: a rule asks for what this model does not do.
    """
    for rule in rules:
        if model.template is None:
            raise ConfigError(f"the rule {rule.name!r} needs a chat model", hint="serve an instruct model")
        try:
            prepare(model, parse_chat(rule.request("?")))
        except RequestError as error:
            raise ConfigError(f"the rule {rule.name!r} cannot run: {error.message}", hint=error.hint) from None


def _publish_filter(settings: RuleSettings) -> str:
    """The topics that a rule's pattern can become, as a filter."""
    wildcards = re.findall(r"[+#]", settings.subscribe)

    def stand_in(level: str) -> str:
        used = {wildcards[int(number) - 1] for number in _PLACEHOLDER.findall(level)}
        return "#" if "#" in used else "+" if used else level

    return "/".join(map(stand_in, settings.publish.split("/")))


def _refuse_circle(rule: Rule, rules: Sequence[Rule]) -> None:
    """Follow the answers from rule to rule.

    Raises:
        ConfigError: they lead back to where they began.
    """
    reached: set[str] = set()
    heads = [rule]
    while heads:
        head = heads.pop()
        for follower in rules:
            if not overlap(head.publish_filter, follower.settings.subscribe):
                continue
            if follower is rule:
                hint = f"change publish or subscribe: {head.settings.publish} can match {rule.settings.subscribe}"
                raise ConfigError(f"the rule {rule.name!r} could react to its own answers", hint=hint)
            if follower.name not in reached:
                reached.add(follower.name)
                heads.append(follower)


def _environment(settings: RuleSettings) -> minijinja.Environment:
    """The compiled template, as the only one of an environment of its own."""
    hint = f"the template may use {', '.join(_VARIABLES)}"
    environment = minijinja.Environment(
        fuel=FUEL, debug=False, undefined_behavior="strict", filters={"tojson": _to_json}, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    try:
        environment.add_template(settings.name, settings.prompt)
    except minijinja.TemplateError as error:
        raise ConfigError(f"the rule {settings.name!r} has a malformed prompt: {error.message}", hint=hint) from None
    known = {*_VARIABLES, *environment.globals}
    if unknown := environment.undeclared_variables_in_template(settings.name) - known:
        raise ConfigError(f"the rule {settings.name!r} has no variable {min(unknown)!r}", hint=hint)
    return environment


def _to_json(value: Any) -> str:
    """Jinja's own ``tojson`` escapes HTML, which confuses models."""
    return json.dumps(value, ensure_ascii=False)


def _read_schema(settings: RuleSettings) -> dict[str, Any] | None:
    if not isinstance(settings.definition, str):
        return settings.definition
    path = Path(settings.definition)
    hint = f"schema of the rule {settings.name!r} names a file with a JSON schema"
    try:
        with path.open("rb") as file:
            schema = parse_json(file.read(MAX_SCHEMA_BYTES))
    except OSError as error:
        raise ConfigError(f"the schema {path} cannot be read: {error.strerror}", hint=hint) from None
    except RequestError:
        raise ConfigError(f"the schema {path} is not valid JSON", hint=hint) from None
    if not isinstance(schema, dict):
        raise ConfigError(f"the schema {path} is no JSON object", hint=hint)
    return schema


def _text(payload: bytes | None, limit: int) -> str:
    """A payload as text; zeros at its end pad the fixed-length strings of PLCs."""
    if payload is None or len(payload) > limit:
        raise TooLargeError(f"the payload is larger than {limit} bytes", hint="raise the rule's max_payload_bytes")
    try:
        text = payload.rstrip(b"\0").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError("the payload is not valid UTF-8", hint="send text or JSON in UTF-8") from None
    if _CONTROL.search(text):
        raise RequestError("the payload holds control characters", hint="send text or JSON in UTF-8")
    return text
