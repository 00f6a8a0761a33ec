"""``[[mqtt.rule]]``: what to ask when a message arrives from something that knows nothing of prompts.

One table is one rule; docs/mqtt-rules.md shows whole examples and ``edge.mqtt.rules`` runs them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edge.settings.section import PROMPT

MAX_RULES = 64
MAX_PROMPT_CHARS = 65_536
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FILTER = re.compile(r"(?!\$)([^+#/\x00-\x1f\x7f]+|\+)(/([^+#/\x00-\x1f\x7f]+|\+))*(/#)?|#")
_PUBLISH = re.compile(r"(?!\$)([^+#/{}\x00-\x1f\x7f]|\{[1-9]\})+(/([^+#/{}\x00-\x1f\x7f]|\{[1-9]\})+)*")

Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class RuleSettings(BaseModel):
    """One rule: which messages it takes, what it asks, and where the answer goes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(description="The rule's name in topics, metrics and logs: letters, digits, `.`, `_` and `-`.")
    subscribe: str = Field(max_length=256, description="Topic filter of the messages, with `+` and `#` as in MQTT.")
    prompt: Annotated[str, PROMPT] = Field(
        min_length=1,
        max_length=MAX_PROMPT_CHARS,
        description="Jinja template of the question, over `payload` (text), `json` (the payload where it is JSON),"
        " `topic`, `levels` (its levels) and `captures` (what the wildcards stand for).",
    )
    publish: str = Field(
        max_length=256,
        description="Topic of the answer; `{1}` to `{9}` are what the wildcards stand for. It must not lead back to the"
        " rule.",
    )
    system: Annotated[str | None, PROMPT] = Field(
        None, max_length=MAX_PROMPT_CHARS, description="System message, as it stands."
    )
    definition: Annotated[dict[str, Any] | str | None, PROMPT] = Field(
        None, alias="schema", description="JSON schema of the answer, as an inline table or the path of a file."
    )
    choices: Annotated[Annotated[tuple[str, ...], Field(min_length=1, max_length=256, strict=False)] | None, PROMPT] = (
        Field(None, description="The answer is one of these texts.")
    )
    model: str | None = Field(None, max_length=256, description="The served model, or one of its adapters.")
    max_tokens: int = Field(256, ge=1, le=1 << 20, description="Most tokens of an answer.")
    temperature: float | None = Field(None, description="Sampling; without these, the model's own values.")
    top_p: float | None = Field(None, description="Sampling: nucleus.")
    top_k: int | None = Field(None, description="Sampling: the likeliest tokens.")
    min_p: float | None = Field(None, description="Sampling: share of the likeliest token's probability.")
    repetition_penalty: float | None = Field(None, description="Sampling: 1 is none.")
    seed: int | None = Field(None, description="Sampling: the same seed gives the same answer.")
    retain: bool = Field(False, description="Whether the broker keeps the answer for later subscribers.")
    qos: Literal[0, 1] = Field(1, description="MQTT quality of service of the answer.")
    min_interval_s: Seconds = Field(
        0.0, description="Least seconds between two answers for one topic; the newest message meanwhile comes next."
    )
    debounce_s: Seconds = Field(
        0.0, description="Seconds a topic must be quiet before its last message is answered: a burst counts once."
    )
    on_change: bool = Field(False, description="Whether a payload that was answered last on its topic does nothing.")
    max_payload_bytes: int = Field(16_384, ge=1, le=65_536, description="Largest payload; a larger one is an error.")
    max_queue: int = Field(16, ge=1, le=256, description="Messages that wait while the rule answers another.")
    when_full: Literal["drop-oldest", "drop-newest"] = Field(
        "drop-oldest", description="Which message goes when one too many waits."
    )

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if _NAME.fullmatch(value) is None:
            raise ValueError("must be 1 to 64 letters, digits, '.', '_' and '-'")
        return value

    @field_validator("subscribe")
    @classmethod
    def _topic_filter(cls, value: str) -> str:
        if _FILTER.fullmatch(value) is None:
            raise ValueError("must be a topic filter: '+' and '#' are levels of their own, '#' the last one, no '$'")
        return value

    @field_validator("publish")
    @classmethod
    def _topic_pattern(cls, value: str) -> str:
        if _PUBLISH.fullmatch(value) is None:
            raise ValueError("must be a topic without wildcards and empty levels; {1} stands for the first wildcard")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> RuleSettings:
        if self.definition is not None and self.choices is not None:
            raise ValueError("must have a schema or choices, not both")
        num_wildcards = len(re.findall(r"[+#]", self.subscribe))
        if any(int(number) > num_wildcards for number in re.findall(r"\{(\d)\}", self.publish)):
            raise ValueError(f"publishes with more captures than its filter has wildcards ({num_wildcards})")
        return self

    @property
    def sampling(self) -> dict[str, float | int]:
        """The sampling fields that are given."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}
