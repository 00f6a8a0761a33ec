"""What an answer must be: the types of assertions.

:func:`prepare` checks an assertion of a suite and gives a :class:`Check`, which judges answers. No model judges another
here, and nothing of a suite is executed; only ``code-runs`` executes what the tested model wrote, in a child without
rights (:mod:`edge.evaluation.sandbox`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from edge.evaluation import extract, json_schema, regexes, sandbox, text_distance
from edge.evaluation.answer import Answer
from edge.evaluation.schema import Assertion

NOT: Final = "not-"
"""Before a type: the opposite."""
MAX_VALUE_CHARS = 2000
"""Of texts whose distance is computed."""
_TRIM = " \t\r\n\"'`*.,;:!?。，；：！？「」“”"  # noqa: RUF001 - Chinese punctuation is meant
_REFUSED: Mapping[str, str] = {
    "javascript": "no code of a suite is executed: use regex, is-json with a schema, or code-runs",
    "python": "no code of a suite is executed: use regex, is-json with a schema, or code-runs",
    "ruby": "no code of a suite is executed: use regex, is-json with a schema, or code-runs",
    "webhook": "nothing is fetched: use an assertion that needs no network",
    "similar": "it needs a model of embeddings; chrf compares letters, levenshtein counts edits",
    "similarity": "say which: chrf compares letters, levenshtein counts edits",
    "cost": "nothing is paid for here: latency, tokens and energy are in the report",
}
_JUDGED_BY_MODELS = (
    "llm-rubric",
    "model-graded",
    "factuality",
    "answer-relevance",
    "context-",
    "g-eval",
    "select-best",
)


@dataclass(frozen=True)
class Judgement:
    """How an answer does."""

    passed: bool
    score: float
    """0 to 1."""
    reason: str


Judge = Callable[[Answer], Judgement]


@dataclass(frozen=True)
class Check:
    """An assertion that is ready to judge."""

    name: str
    """Its type."""
    judge: Judge
    weight: float
    metric: str | None
    runs_code: bool = False
    """Whether it executes what the model wrote."""


def prepare(spec: Assertion, value: Any, setup: str = "") -> Check:
    """Make an assertion ready.

    Args:
        spec: as the suite has it.
        value: its value, with variables filled in.
        setup: its ``setup``, likewise.

    Raises:
        ValueError: there is no such type, or the value or a field does not belong to it.
    """
    name = spec.type.removeprefix(NOT)
    if name not in TYPES:
        raise ValueError(f"there is no assertion of the type {spec.type!r}{_advice(name)}")
    allowed, make = TYPES[name]
    given = {field for field in ("threshold", "tolerance", "after", "setup", "timeout_s", "memory_mb")
             if getattr(spec, field) is not None}  # fmt: skip
    if surplus := sorted(given - allowed):
        raise ValueError(f"{surplus[0]} does not belong to the type {name}")
    judge = make(spec, value, setup) if name == "code-runs" else make(spec, value)
    if name != spec.type:
        judge = _opposite(judge)
    return Check(spec.type, judge, spec.weight, spec.metric, runs_code=name == "code-runs")


def _advice(name: str) -> str:
    advice = _REFUSED.get(name)
    if name.startswith(_JUDGED_BY_MODELS):
        advice = "no model judges the answers here: use an assertion that needs none"
    return f": {advice}" if advice else f"; known are {', '.join(sorted(TYPES))}"


def _opposite(judge: Judge) -> Judge:
    def opposite(answer: Answer) -> Judgement:
        found = judge(answer)
        return Judgement(not found.passed, 1.0 - found.score, f"must not be so: {found.reason}")

    return opposite


def _yes_or_no(passed: bool, reason: str) -> Judgement:
    return Judgement(passed, float(passed), reason)


# --- values --------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise ValueError("needs a text as its value")
    return str(value)


def _texts(value: Any) -> list[str]:
    return [_text(item) for item in value] if isinstance(value, list) and value else [_text(value)]


def _number(value: Any) -> float:
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError("needs a number as its value")


def plain(text: str) -> str:
    """A short answer without what models put around it: quotes, stars, a full stop; and without case."""
    return text.strip(_TRIM).casefold()


# --- types ---------------------------------------------------------------------------------------------------------


def _containing(*, fold: bool, every: bool) -> Callable[[Assertion, Any], Judge]:
    """``contains`` and its relatives: of one text or of several, with regard to case or without."""

    def make(_spec: Assertion, value: Any) -> Judge:
        wanted = _texts(value)

        def judge(answer: Answer) -> Judgement:
            text = answer.text.casefold() if fold else answer.text
            missing = [piece for piece in wanted if (piece.casefold() if fold else piece) not in text]
            passed = not missing if every else len(missing) < len(wanted)
            return _yes_or_no(
                passed, f"contains {'all of ' if every else ''}{wanted}" if passed else f"lacks {missing}"
            )

        return judge

    return make


def _comparing(
    form: Callable[[str], str], holds: Callable[[str, str], bool], words: str
) -> Callable[[Assertion, Any], Judge]:
    """The answer, brought into a form, against texts of which one must do."""

    def make(_spec: Assertion, value: Any) -> Judge:
        wanted = _texts(value)

        def judge(answer: Answer) -> Judgement:
            text = form(answer.text)
            passed = any(holds(text, form(option)) for option in wanted)
            return _yes_or_no(passed, f"{words if passed else 'not: ' + words} {' | '.join(wanted)}")

        return judge

    return make


def _regex(_spec: Assertion, value: Any) -> Judge:
    pattern = _text(value)
    regexes.check(pattern)

    def judge(answer: Answer) -> Judgement:
        passed = regexes.is_match(pattern, answer.text)
        return _yes_or_no(passed, f"{'matches' if passed else 'does not match'} {pattern}")

    return judge


def _json(read: Callable[[str], Any], words: str) -> Callable[[Assertion, Any], Judge]:
    def make(_spec: Assertion, value: Any) -> Judge:
        schema = True if value is None else value
        json_schema.check_schema(schema)

        def judge(answer: Answer) -> Judgement:
            try:
                found = read(answer.text.strip())
            except ValueError as error:
                return _yes_or_no(False, f"{words} no JSON: {error}")
            try:
                json_schema.check(found, schema)
            except json_schema.MismatchError as error:
                return _yes_or_no(False, str(error))
            return _yes_or_no(True, "is JSON" if schema is True else "follows the schema")

        return judge

    return make


def _a_number(spec: Assertion, value: Any) -> Judge:
    wanted, tolerance, after = _number(value), spec.tolerance or 0.0, spec.after
    slack = tolerance + 1e-9 * max(1.0, abs(wanted))

    def judge(answer: Answer) -> Judgement:
        text = answer.text
        if after is not None:
            _, found, text = text.rpartition(after)
            if not found:
                return _yes_or_no(False, f"lacks {after!r}")
        numbers = extract.numbers(text)
        if not numbers:
            return _yes_or_no(False, "has no number")
        values = numbers[-1 if after is None else 0]
        nearest = min(values, key=lambda number: abs(number - wanted))
        return _yes_or_no(abs(nearest - wanted) <= slack, f"says {nearest:g}, expected {wanted:g}")

    return judge


def _levenshtein(spec: Assertion, value: Any) -> Judge:
    wanted = _bounded(_text(value))
    most = 5 if spec.threshold is None else min(int(spec.threshold), MAX_VALUE_CHARS)

    def judge(answer: Answer) -> Judgement:
        distance = text_distance.edit_distance(answer.text.strip(), wanted, most)
        words = f"{distance} edits away" if distance <= most else f"more than {most} edits away"
        return _yes_or_no(distance <= most, words)

    return judge


def _chrf(spec: Assertion, value: Any) -> Judge:
    wanted, least = _bounded(_text(value)), 0.5 if spec.threshold is None else spec.threshold
    if least > 1:
        raise ValueError("threshold is a score from 0 to 1")

    def judge(answer: Answer) -> Judgement:
        score = text_distance.chrf(answer.text, wanted)
        return Judgement(score >= least, score, f"chrF {score:.2f}, at least {least:g} is wanted")

    return judge


def _bounded(text: str) -> str:
    if len(text) > MAX_VALUE_CHARS:
        raise ValueError(f"has a value of more than {MAX_VALUE_CHARS} characters")
    return text


def _latency(spec: Assertion, value: Any) -> Judge:
    if value is not None or spec.threshold is None:
        raise ValueError("needs a threshold in ms, and no value")
    most = spec.threshold
    return lambda answer: _yes_or_no(answer.latency_ms <= most, f"took {answer.latency_ms:.0f} ms of {most:g}")


def _code_runs(spec: Assertion, value: Any, setup: str) -> Judge:
    checks = _text(value)
    limits = sandbox.Limits(
        cpu_s=spec.timeout_s or sandbox.Limits.cpu_s, memory_mb=spec.memory_mb or sandbox.Limits.memory_mb
    )

    def judge(answer: Answer) -> Judgement:
        outcome = sandbox.run("\n".join([setup, extract.code(answer.text), checks]), limits)
        return _yes_or_no(outcome.passed, outcome.reason)

    return judge


TYPES: Mapping[str, tuple[frozenset[str], Callable[..., Judge]]] = {
    "contains": (frozenset(), _containing(fold=False, every=True)),
    "icontains": (frozenset(), _containing(fold=True, every=True)),
    "contains-all": (frozenset(), _containing(fold=False, every=True)),
    "icontains-all": (frozenset(), _containing(fold=True, every=True)),
    "contains-any": (frozenset(), _containing(fold=False, every=False)),
    "icontains-any": (frozenset(), _containing(fold=True, every=False)),
    "equals": (frozenset(), _comparing(str.strip, str.__eq__, "equals")),
    "starts-with": (frozenset(), _comparing(str.strip, str.startswith, "starts with")),
    "is-one-of": (frozenset(), _comparing(plain, str.__eq__, "is")),
    "regex": (frozenset(), _regex),
    "is-json": (frozenset(), _json(extract.whole_json, "is")),
    "contains-json": (frozenset(), _json(extract.some_json, "contains")),
    "number": (frozenset({"tolerance", "after"}), _a_number),
    "levenshtein": (frozenset({"threshold"}), _levenshtein),
    "chrf": (frozenset({"threshold"}), _chrf),
    "latency": (frozenset({"threshold"}), _latency),
    "code-runs": (frozenset({"setup", "timeout_s", "memory_mb"}), _code_runs),
}
"""By name: the fields that belong to a type beside its value, and what makes its judge."""
