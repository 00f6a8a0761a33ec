"""From a suite's file to cases: every prompt filled by every test, with its assertions ready to judge.

A suite is one of those that come with qwedge (:data:`BUILT_IN`), by its name, or a YAML file. Files that it refers to
with ``file://`` lie in its folder or below.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from edge.errors import ConfigError
from edge.evaluation import assertions, template
from edge.evaluation.document import Document, read_document
from edge.evaluation.document import Path as Place
from edge.evaluation.schema import DefaultTest, Message, Prompt, SuiteFile, Test, parse

BUILT_IN: Final = Path(__file__).with_name("suites")
MAX_CASES: Final = 5000
MAX_DATA_BYTES: Final = 16 << 20
DEFAULT_OPTIONS: Final[Mapping[str, Any]] = {"temperature": 0, "max_tokens": 512}
"""Where a suite says nothing else: the likeliest answer, which is the same every time, and not for ever."""
_FILE = "file://"


@dataclass(frozen=True)
class Case:
    """One question and what its answer must be."""

    id: str
    """Unique in the suite, the same as long as the suite is."""
    description: str
    metadata: Mapping[str, Any]
    """What reports group by."""
    body: Mapping[str, Any]
    """OpenAI's request, without the model's name."""
    checks: tuple[assertions.Check, ...]
    threshold: float | None
    """Weighted score from which the case passes; None = every check must hold."""
    digest: str
    """Of question and assertions: results of two runs belong together when it is the same."""

    @property
    def question(self) -> str:
        """What the user says last."""
        return str(self.body["messages"][-1]["content"])


@dataclass(frozen=True)
class Suite:
    """Cases that belong together."""

    name: str
    description: str
    licence: str
    cases: tuple[Case, ...]

    @cached_property
    def digest(self) -> str:
        """Of all cases."""
        return sha256("".join(case.digest for case in self.cases).encode()).hexdigest()

    @property
    def runs_code(self) -> bool:
        """Whether judging executes what the model wrote."""
        return any(check.runs_code for case in self.cases for check in case.checks)

    def limited(self, most: int) -> Suite:
        """The suite with at most so many of its cases, spread evenly."""
        count = len(self.cases)
        if most >= count:
            return self
        cases = tuple(self.cases[number * count // most] for number in range(most))
        return Suite(self.name, self.description, self.licence, cases)

    def where(self, conditions: Mapping[str, str]) -> Suite:
        """The suite with the cases whose metadata say so.

        Raises:
            ConfigError: there are none.
        """
        cases = tuple(
            case
            for case in self.cases
            if all(str(case.metadata.get(key)) == value for key, value in conditions.items())
        )
        if not cases:
            keys = sorted({key for case in self.cases for key in case.metadata})
            hint = f"its cases can be chosen by {', '.join(keys)}" if keys else "its cases have no metadata"
            raise ConfigError(f"no case of {self.name} is like that", hint=hint)
        return Suite(self.name, self.description, self.licence, cases)


def built_in_suites() -> list[str]:
    """Names of the suites that come with qwedge."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def load_suite(what: str | Path) -> Suite:
    """Read a suite and make its cases ready.

    Args:
        what: the name of one that comes with qwedge, or a file.

    Raises:
        ConfigError: there is none, or it says something wrong; names file and line.
    """
    path = BUILT_IN / f"{what}.yaml" if what in built_in_suites() else Path(what)
    if not path.suffix and not path.exists():
        hint = f"there are {', '.join(built_in_suites())}; or name a YAML file"
        raise ConfigError(f"there is no suite {str(what)!r}", hint=hint)
    document = _read_document(path, str(path.name))
    return _Expansion(path, document).suite()


@dataclass(frozen=True)
class _Source:
    """Where something stands."""

    document: Document
    place: Place

    def error(self, reason: str, *inner: str | int) -> ConfigError:
        return self.document.error((*self.place, *inner), reason)


@dataclass(frozen=True)
class _Prompt:
    """A template, and how answers to it are made."""

    messages: tuple[Message, ...]
    options: Mapping[str, Any]


class _Expansion:
    """Makes cases of a suite's file."""

    def __init__(self, path: Path, document: Document) -> None:
        self._path = path
        self._root = _Source(document, ())
        self._file = parse(SuiteFile, document)

    def suite(self) -> Suite:
        prompts: dict[str, _Prompt] = {}
        for number, spec in enumerate(self._file.prompts):
            prompt = self._prompt(spec, _Source(self._root.document, ("prompts", number)))
            label = (spec.label if isinstance(spec, Prompt) else None) or str(number + 1)
            if label in prompts:
                raise self._root.error(f"two prompts have the label {label!r}", "prompts", number)
            prompts[label] = prompt
        labels = list(prompts)
        cases: list[Case] = []
        for number, (test, source) in enumerate(self._tests(), start=1):
            chosen = self._chosen(test, source, labels)
            for label, prompt in prompts.items():
                if label in chosen:
                    case_id = f"{number}/{label}" if len(chosen) > 1 else str(number)
                    cases.append(self._case(case_id, prompt, test, source))
            if len(cases) > MAX_CASES:
                raise self._root.error(f"there are more than {MAX_CASES} cases", "tests")
        return Suite(self._path.stem, self._file.description, self._file.licence or "", tuple(cases))

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _prompt(self, spec: str | Prompt, source: _Source) -> _Prompt:
        raw, config = (spec, {}) if isinstance(spec, str) else (spec.raw, spec.config.given())
        if not isinstance(raw, str):
            return _Prompt(tuple(raw), config)
        if raw.startswith(_FILE):
            raw = _read(self._inside(raw, source), MAX_DATA_BYTES).decode("utf-8", "replace")
        if not raw.lstrip().startswith("["):
            return _Prompt((Message(role="user", content=raw),), config)
        # Promptfoo's way to write a conversation into a string.
        lines: dict[Place, int] = {(): source.document.lines.get(source.place, 1)}
        parsed = parse(Prompt, Document(source.document.name, {"raw": _parse_json(raw, source)}, lines))
        assert isinstance(parsed.raw, list)
        return _Prompt(tuple(parsed.raw), config)

    # --- tests ------------------------------------------------------------------------------------------------------

    def _tests(self) -> Iterator[tuple[Test, _Source]]:
        """Every test with its defaults, once for each combination of variables that have several values."""
        tests = self._file.tests
        for number, test in enumerate([tests] if isinstance(tests, str) else tests):
            place: Place = ("tests",) if isinstance(tests, str) else ("tests", number)
            source = _Source(self._root.document, place)
            found = self._tests_of_file(test, source) if isinstance(test, str) else [(test, source)]
            for one, where in found:
                yield from ((combined, where) for combined in _combinations(one, self._file.default_test))

    def _tests_of_file(self, reference: str, source: _Source) -> Iterator[tuple[Test, _Source]]:
        if not (reference.startswith(_FILE) and reference.endswith(".jsonl")):
            raise source.error("tests of a file are named as file://NAME.jsonl")
        path = self._inside(reference, source)
        for number, line in enumerate(_read(path, MAX_DATA_BYTES).split(b"\n"), start=1):
            if not line.strip():
                continue
            document = Document(path.name, None, {(): number})
            value = _parse_json(line.decode("utf-8", "replace"), _Source(document, ()))
            document = Document(path.name, value, {(): number})
            yield parse(Test, document), _Source(document, ())

    def _chosen(self, test: Test, source: _Source, labels: list[str]) -> set[str]:
        chosen = set(labels if test.prompts is None else test.prompts)
        if unknown := sorted(chosen - set(labels)):
            raise source.error(f"there is no prompt {unknown[0]!r}", "prompts")
        return chosen

    def _case(self, case_id: str, prompt: _Prompt, test: Test, source: _Source) -> Case:
        body = self._body(prompt, test, source)
        checks, facts = self._checks(test, source)
        whole = json.dumps({"body": body, "assert": facts, "threshold": test.threshold}, sort_keys=True)
        return Case(
            id=case_id,
            description=test.description or "",
            metadata=test.metadata,
            body=body,
            checks=tuple(checks),
            threshold=test.threshold,
            digest=sha256(whole.encode()).hexdigest()[:16],
        )

    def _body(self, prompt: _Prompt, test: Test, source: _Source) -> dict[str, Any]:
        default = self._file.default_test.options.given()
        options = {**DEFAULT_OPTIONS, **self._file.options.given(), **prompt.options, **default, **test.options.given()}
        try:
            turns = [
                {"role": turn.role, "content": template.as_text(template.fill(turn.content, test.vars))}
                for turn in prompt.messages
            ]
            return {"messages": turns, **template.fill(options, test.vars)}
        except ValueError as error:
            raise source.error(str(error)) from None

    def _checks(self, test: Test, source: _Source) -> tuple[list[assertions.Check], list[dict[str, Any]]]:
        """The assertions of all tests and of this one, ready to judge; and what they say, for the digest."""
        num_shared = len(self._file.default_test.asserts)
        checks, facts = [], []
        for number, spec in enumerate(test.asserts):
            try:
                value = template.fill(spec.value, test.vars)
                setup = template.as_text(template.fill(spec.setup or "", test.vars))
                checks.append(assertions.prepare(spec, value, setup))
            except ValueError as error:
                if number < num_shared:
                    raise self._root.error(str(error), "defaultTest", "assert", number) from None
                raise source.error(str(error), "assert", number - num_shared) from None
            # Without defaults: a field that is new tomorrow must not make another case of this one.
            facts.append({**spec.model_dump(exclude_defaults=True), "value": value, "setup": setup})
        if not checks:
            raise source.error("the test has no assertion")
        return checks, facts

    def _inside(self, reference: str, source: _Source) -> Path:
        """A file that the suite names: in its folder or below, links followed."""
        folder = self._path.resolve().parent
        path = (folder / reference.removeprefix(_FILE)).resolve()
        if not path.is_relative_to(folder):
            raise source.error("files of a suite lie in its folder")
        return path


def _combinations(test: Test, default: DefaultTest) -> Iterator[Test]:
    variables = {**default.vars, **test.vars}
    several = {name: value for name, value in variables.items() if isinstance(value, list)}
    merged = {
        "asserts": [*default.asserts, *test.asserts],
        "threshold": default.threshold if test.threshold is None else test.threshold,
        "metadata": {**default.metadata, **test.metadata},
    }
    for values in itertools.islice(itertools.product(*several.values()), MAX_CASES + 1):
        yield test.model_copy(update={**merged, "vars": {**variables, **dict(zip(several, values, strict=True))}})


def _read_document(path: Path, name: str) -> Document:
    return read_document(name, _read(path, MAX_DATA_BYTES))


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="check the path") from None
    if len(data) > most:
        raise ConfigError(f"{path} is larger than {most >> 20} MiB", hint="split the suite")
    return data


def _parse_json(text: str, source: _Source) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise source.error("it is no JSON") from None
