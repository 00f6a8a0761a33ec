"""The fields of a suite's file: promptfoo's, as far as they are supported [1].

What a suite asks for and does not get would make its score a lie, so unknown fields are errors, with a hint where there
is another way. ``docs/evaluation.md`` describes the format for people.

[1] https://www.promptfoo.dev/docs/configuration/reference/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge.evaluation.document import Document, Path
from edge.violations import violation

MAX_TESTS = 5000
MAX_PROMPTS = 64
MAX_ASSERTIONS = 64
_HINTS: Mapping[str, str] = {
    "providers": "name what is tested on the command line: --bundle or --url",
    "targets": "name what is tested on the command line: --bundle or --url",
    "scenarios": "write the tests out, or give a variable a list of values",
    "nunjucksFilters": "only {{name}} is replaced",
    "transform": "use contains-json, number or code-runs, which look into the answer",
    "provider": "no model judges the answers: use an assertion that needs none",
    "assertScoringFunction": "use weight and threshold",
    "rubricPrompt": "no model judges the answers: use an assertion that needs none",
}
"""For fields of promptfoo that are not supported."""

Text = Annotated[str, Field(max_length=64 << 10)]
Label = Annotated[str, Field(min_length=1, max_length=200)]


class _Fields(BaseModel):
    # Strict: "0.7" where a number belongs is a mistake that should show.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)


class Message(_Fields):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class Options(_Fields):
    """How the model answers: fields of OpenAI's request and of qwedge's."""

    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    enable_thinking: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are there."""
        return self.model_dump(exclude_none=True)


class Prompt(_Fields):
    """A template that every test fills."""

    label: Label | None = None
    raw: Text | Annotated[list[Message], Field(min_length=1, max_length=256)]
    """What the user says, or a conversation."""
    config: Options = Field(default_factory=Options)
    """How answers to this prompt are made."""


class Assertion(_Fields):
    """What an answer must be; :mod:`edge.evaluation.assertions` knows the types and which fields belong to them."""

    type: Label
    value: Any = None
    threshold: Annotated[float, Field(ge=0)] | None = None
    tolerance: Annotated[float, Field(ge=0)] | None = None
    """``number``: how far off the value it may be."""
    after: str | None = None
    """``number``: takes the first number after the last occurrence of this text."""
    setup: str | None = None
    """``code-runs``: a program that comes before the answer's code."""
    timeout_s: Annotated[float, Field(gt=0, le=120)] | None = None
    """``code-runs``: processor time."""
    memory_mb: Annotated[int, Field(ge=64, le=4096)] | None = None
    """``code-runs``: address space."""
    weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    metric: Label | None = None
    """Also counted under this name."""


class DefaultTest(_Fields):
    """What all tests have in common."""

    vars: dict[str, Any] = Field(default_factory=dict)
    asserts: Annotated[list[Assertion], Field(alias="assert", max_length=MAX_ASSERTIONS)] = Field(default_factory=list)
    options: Options = Field(default_factory=Options)
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weighted score from which a case passes; None = every assertion must hold."""
    metadata: dict[Label, str | int | float | bool] = Field(default_factory=dict)
    """What the report groups by: ``language: de``."""


class Test(DefaultTest):
    """One test; it becomes a case for every prompt."""

    description: Text | None = None
    prompts: list[Label] | None = None
    """Labels of the prompts that it is for; None = all."""


class SuiteFile(_Fields):
    """The whole file."""

    description: Text = ""
    prompts: Annotated[list[str | Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
    tests: str | Annotated[list[str | Test], Field(min_length=1, max_length=MAX_TESTS)]
    """Tests, or ``file://NAME.jsonl`` with one on each line."""
    default_test: Annotated[DefaultTest, Field(alias="defaultTest")] = Field(default_factory=DefaultTest)
    options: Options = Field(default_factory=Options)
    licence: Text | None = None
    """Where the tests come from, and what they may be used for."""

    @model_validator(mode="before")
    @classmethod
    def _without_notes(cls, value: Any) -> Any:
        """Promptfoo's editors begin a file with a ``$schema``, which says nothing."""
        return {key: inner for key, inner in value.items() if key != "$schema"} if isinstance(value, dict) else value


_Kind = TypeVar("_Kind", bound=BaseModel)


def parse(kind: type[_Kind], document: Document) -> _Kind:
    """Check a document.

    Raises:
        ConfigError: it does not follow ``kind``; names the line.
    """
    try:
        return kind.model_validate(document.value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        # Of a value that may be one thing or another, the branch that got furthest says what is wrong.
        path, message, extra = max(
            (
                (
                    _path(e["loc"], document.value, missing=e["type"] == "missing"),
                    e["msg"],
                    e["type"] == "extra_forbidden",
                )
                for e in found
            ),
            key=lambda item: len(item[0]),
        )
        if extra:
            name = str(path[-1])
            hint = {"hint": _HINTS[name]} if name in _HINTS else {}
            raise document.error(path, f"the field {name!r} is not known here", **hint) from None
        field = ".".join(map(str, path)) or "the file"
        reason = violation(message)
        raise document.error(path, f"{field}: {reason[:1].lower()}{reason[1:]}") from None


def _path(location: tuple[str | int, ...], root: Any, *, missing: bool) -> Path:
    """A pydantic location without the names of union members in it; a missing field's name stays at its end."""
    path: Path = ()
    node = root
    for step in location:
        if step in node if isinstance(node, dict) else isinstance(node, list) and step in range(len(node)):
            path, node = (*path, step), node[step]
    return (*path, location[-1]) if missing else path
