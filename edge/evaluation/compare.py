"""Two reports of the same cases: what became better, what worse, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from edge.errors import ConfigError
from edge.evaluation.report import Report, Result
from edge.evaluation.suite import Suite

RESAMPLES: Final = 10_000
SEED: Final = 1


@dataclass(frozen=True)
class Comparison:
    """A report against a baseline, over the cases that both have."""

    baseline: str
    """Name of the baseline's target."""
    cases: int
    """That both have."""
    score: float
    baseline_score: float
    gained: tuple[str, ...]
    """Ids of the cases that pass now and did not."""
    lost: tuple[str, ...]
    """Those that do not pass any more."""
    interval: tuple[float, float]
    """What the difference could be with other cases of the same kind, in 95% of all draws (paired bootstrap)."""
    p_value: float
    """How likely at least so lopsided a split of gained and lost would be if neither were better (McNemar, exact)."""

    @property
    def difference(self) -> float:
        """Of the scores: more than zero is better."""
        return self.score - self.baseline_score

    def as_json(self) -> dict[str, Any]:
        """For the report's file."""
        return {
            "baseline": self.baseline,
            "cases": self.cases,
            "score": round(self.score, 6),
            "baseline_score": round(self.baseline_score, 6),
            "difference": round(self.difference, 6),
            "difference_interval": [round(bound, 6) for bound in self.interval],
            "p_value": round(self.p_value, 6),
            "gained": list(self.gained),
            "lost": list(self.lost),
        }


def check_comparable(suite: Suite, baseline: Report) -> None:
    """Look whether a baseline has cases of a suite, before the long work.

    Raises:
        ConfigError: it has none.
    """
    if not {(case.id, case.digest) for case in suite.cases} & _by_key(baseline).keys():
        raise _nothing_in_common(suite.name)


def compare(report: Report, baseline: Report) -> Comparison:
    """Compare case by case; cases count as the same where question and assertions are.

    Raises:
        ConfigError: there are none that both have.
    """
    before = _by_key(baseline)
    pairs = [(result, before[key]) for result in report.results if (key := (result.id, result.digest)) in before]
    if not pairs:
        raise _nothing_in_common(report.suite)
    gained = tuple(now.id for now, then in pairs if now.passed and not then.passed)
    lost = tuple(now.id for now, then in pairs if then.passed and not now.passed)
    return Comparison(
        baseline=baseline.target,
        cases=len(pairs),
        score=sum(now.passed for now, _ in pairs) / len(pairs),
        baseline_score=sum(then.passed for _, then in pairs) / len(pairs),
        gained=gained,
        lost=lost,
        interval=_bootstrap(pairs),
        p_value=mcnemar(len(gained), len(lost)),
    )


def _by_key(report: Report) -> dict[tuple[str, str], Result]:
    return {(result.id, result.digest): result for result in report.results}


def _nothing_in_common(suite: str) -> ConfigError:
    hint = "compare reports of the same suite, and of the same version of it"
    return ConfigError(f"the baseline has no case of {suite}", hint=hint)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact test of a split that is a matter of luck if neither side is better."""
    count, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(count, number) for number in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << count))


def _bootstrap(pairs: list[tuple[Result, Result]]) -> tuple[float, float]:
    import numpy as np  # noqa: PLC0415 - a command line that only shows help does without

    # Drawing cases anew is drawing how many of them are gained and how many lost.
    differences = np.array([now.passed - then.passed for now, then in pairs])
    counts = [int((differences == value).sum()) for value in (1, -1, 0)]
    draws = np.random.default_rng(SEED).multinomial(len(pairs), np.array(counts) / len(pairs), RESAMPLES)
    interval = np.quantile((draws[:, 0] - draws[:, 1]) / len(pairs), (0.025, 0.975))
    return float(interval[0]), float(interval[1])
