"""What an evaluation found, as values, as JSON, and back.

The JSON's form is described in docs/schemas/evaluation.schema.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

from edge.errors import ConfigError
from edge.evaluation.answer import Answer
from edge.evaluation.suite import Case

SCHEMA_VERSION: Final = 1
MAX_REPORT_BYTES: Final = 256 << 20
_Z95: Final = 1.959964


@dataclass(frozen=True)
class Verdict:
    """How an answer did at one assertion."""

    type: str
    passed: bool
    score: float
    weight: float
    metric: str | None
    reason: str


@dataclass(frozen=True)
class Result:
    """What became of one case."""

    id: str
    digest: str
    """See :attr:`edge.evaluation.suite.Case.digest`."""
    description: str
    metadata: Mapping[str, Any]
    question: str
    passed: bool
    points: float
    """Weighted mean of the assertions' scores, 0 to 1."""
    verdicts: tuple[Verdict, ...] = ()
    answer: Answer | None = None
    error: str | None = None
    """Why there is no answer."""

    @classmethod
    def judged(cls, case: Case, answer: Answer) -> Result:
        """From what was answered."""
        verdicts = []
        for check in case.checks:
            found = check.judge(answer)
            verdicts.append(Verdict(check.name, found.passed, found.score, check.weight, check.metric, found.reason))
        weights = sum(verdict.weight for verdict in verdicts)
        points = sum(verdict.weight * verdict.score for verdict in verdicts) / weights if weights else 1.0
        failed = any(not verdict.passed for verdict in verdicts if verdict.weight > 0)
        passed = not failed if case.threshold is None else points >= case.threshold - 1e-9
        return cls(**_head(case), passed=passed, points=round(points, 6), verdicts=tuple(verdicts), answer=answer)

    @classmethod
    def failed(cls, case: Case, error: str) -> Result:
        """Without an answer."""
        return cls(**_head(case), passed=False, points=0.0, error=error)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Result:
        """Back from :func:`dataclasses.asdict`.

        Raises:
            LookupError, TypeError: it is none.
        """
        answer = value["answer"]
        return cls(
            **{field.name: value[field.name] for field in fields(cls) if field.name not in {"answer", "verdicts"}},
            answer=None if answer is None else Answer(**answer),
            verdicts=tuple(Verdict(**verdict) for verdict in value["verdicts"]),
        )


def _head(case: Case) -> dict[str, Any]:
    return {
        "id": case.id,
        "digest": case.digest,
        "description": case.description,
        "metadata": dict(case.metadata),
        "question": case.question,
    }


@dataclass(frozen=True)
class Share:
    """How many of a group of cases passed."""

    passed: int
    count: int

    @classmethod
    def of(cls, results: Iterable[Result]) -> Share:
        """Count."""
        flags = [result.passed for result in results]
        return cls(sum(flags), len(flags))

    @property
    def value(self) -> float:
        """0 to 1."""
        return self.passed / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """What the share could be with other cases of the same kind, in 95% of all draws (Wilson's interval)."""
        if not self.count:
            return 0.0, 1.0
        p, n, z = self.value, self.count, _Z95
        centre, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - width) / (1 + z * z / n)), min(1.0, (centre + width) / (1 + z * z / n))


@dataclass(frozen=True)
class Report:
    """One target's results in one suite."""

    suite: str
    description: str
    suite_digest: str
    target: str
    """Name of what was evaluated."""
    facts: Mapping[str, Any]
    """See :attr:`edge.evaluation.target.Target.facts`."""
    started: str
    """UTC, as ISO 8601 has it."""
    seconds: float
    """Of this run; what an earlier one had done took none."""
    results: tuple[Result, ...]
    """In the suite's order."""

    @property
    def share(self) -> Share:
        """Of all cases."""
        return Share.of(self.results)

    @property
    def score(self) -> float:
        """Share of the cases that passed, 0 to 1: what gates look at."""
        return self.share.value

    @property
    def points(self) -> float:
        """Mean of the cases' points, which count assertions that hold in cases that fail, 0 to 1."""
        return mean(result.points for result in self.results) if self.results else 0.0

    @property
    def num_errors(self) -> int:
        """Cases without an answer."""
        return sum(result.error is not None for result in self.results)

    def groups(self) -> dict[str, dict[str, Share]]:
        """By each key of the metadata, the share of each of its values."""
        found: dict[str, dict[str, list[Result]]] = {}
        for result in self.results:
            for key, value in result.metadata.items():
                found.setdefault(key, {}).setdefault(str(value), []).append(result)
        return {key: {value: Share.of(results) for value, results in of.items()} for key, of in found.items()}

    def metrics(self) -> dict[str, float]:
        """Mean score of the assertions that have a name."""
        found: dict[str, list[float]] = {}
        for result in self.results:
            for verdict in result.verdicts:
                if verdict.metric is not None:
                    found.setdefault(verdict.metric, []).append(verdict.score)
        return {name: mean(scores) for name, scores in found.items()}

    def figures(self) -> dict[str, float | None]:
        """What the answers took; None where no answer tells."""
        answers = [result.answer for result in self.results if result.answer is not None]

        def over(name: str, combine: Callable[[list[float]], float]) -> float | None:
            values = [value for answer in answers if (value := getattr(answer, name)) is not None]
            return round(combine(values), 3) if values else None

        return {
            "latency_ms_median": over("latency_ms", median),
            "latency_ms_p95": over("latency_ms", _p95),
            "ttft_ms_median": over("ttft_ms", median),
            "tokens_per_second_median": over("tokens_per_second", median),
            "prompt_tokens": over("prompt_tokens", sum),
            "completion_tokens": over("completion_tokens", sum),
            "energy_j": over("energy_j", sum),
        }

    def summary(self) -> dict[str, Any]:
        """The report without its cases: for manifests and lists."""
        low, high = self.share.interval
        return {
            "suite": self.suite,
            "suite_digest": self.suite_digest,
            "target": self.target,
            "started": self.started,
            "cases": len(self.results),
            "passed": self.share.passed,
            "errors": self.num_errors,
            "score": round(self.score, 6),
            "score_interval": [round(low, 6), round(high, 6)],
            "points": round(self.points, 6),
        }

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "schema_version": SCHEMA_VERSION,
            **self.summary(),
            "description": self.description,
            "facts": dict(self.facts),
            "seconds": self.seconds,
            "groups": {
                key: {value: {"passed": share.passed, "cases": share.count} for value, share in of.items()}
                for key, of in self.groups().items()
            },
            "metrics": {name: round(value, 6) for name, value in self.metrics().items()},
            "figures": self.figures(),
            "results": [asdict(result) for result in self.results],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Report:
        """Back from :meth:`as_json`.

        Raises:
            LookupError, TypeError: it is none.
        """
        if value["schema_version"] != SCHEMA_VERSION:
            raise LookupError("schema_version")
        names = ("suite", "description", "suite_digest", "target", "facts", "started", "seconds")
        results = tuple(Result.from_json(result) for result in value["results"])
        return cls(**{name: value[name] for name in names}, results=results)

    @classmethod
    def read(cls, path: Path) -> Report:
        """From a file of ``--json``.

        Raises:
            ConfigError: it cannot be read, or is none.
        """
        try:
            with path.open("rb") as file:
                value = json.loads(file.read(MAX_REPORT_BYTES))
            return cls.from_json(value.get("report", value))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="check the path") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"{path} is no report of qwedge eval", hint="write one with --json FILE") from None


def _p95(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(0.95 * len(values)) - 1)]
