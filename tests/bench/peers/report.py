"""From what was measured to ratios, a table and a JSON line. Pure: nothing here runs or reads anything.

A ratio is always ours to the peer's, taken within a round, so that whatever slowed the machine in that round slowed
both sides. ``best`` is the best peer of each round, which need not be the same one every time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

OURS = "qwedge"
BEST = "best peer"


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    name: str
    """Of the figure, as the workload gives it."""
    workload: str
    label: str
    better: Literal["more", "less"] | None
    """None: no contest, so no ratio."""
    target: float | None = None
    """Of the ratio to the best peer, or of our own figure if ``absolute``."""
    digits: int = 1
    absolute: bool = False


METRICS = (
    Metric("prefill_tokens_per_second", "plain", "prefill of 512, tokens/s", "more", 1.0),
    Metric("decode_tokens_per_second", "plain", "decode of 128 after it, tokens/s", "more", 1.2),
    Metric("plain_tokens", "plain", "tokens of that answer", None, digits=0),
    Metric("clients_tokens_per_second", "clients", "8 clients, total tokens/s", "more", 2.0),
    Metric("extraction_tokens_per_second", "extraction", "JSON extraction, tokens/s end to end", "more", 2.5),
    Metric("extraction_s", "extraction", "JSON extraction, s", "less", digits=2),
    Metric("extraction_right", "extraction", "events found, of 6", None, digits=0),
    Metric("edit_tokens_per_second", "edit", "copying edit, tokens/s end to end", "more", 2.5),
    Metric("edit_s", "edit", "copying edit, s", "less", digits=2),
    Metric("edit_likeness", "edit", "lines as expected, share", None, digits=2),
    Metric("cold_s", "prefix", "1,000-token system prompt, cold TTFT, s", "less", digits=2),
    Metric("cached_s", "prefix", "the same, cached TTFT, s", "less", 1.0, digits=3),
    Metric("cached_share", "prefix", "cached TTFT, share of cold", "less", 0.02, digits=3, absolute=True),
    Metric("cached_tokens", "prefix", "tokens reported as cached", None, digits=0),
    Metric("restart_s", "restart", "the same after a restart, TTFT, s", "less", 1.0, digits=3),
    Metric("restart_cached_tokens", "restart", "tokens reported as cached", None, digits=0),
    Metric("peak_mb", "memory", "peak RSS, MB", "less", 1.0, digits=0),
    Metric("anonymous_mb", "memory", "anonymous memory, MB", "less", digits=0),
    Metric("proportional_mb", "memory", "PSS while editing, MB", "less", digits=0),
    Metric("start_s", "start", "cold start to first token, s", "less", 1.5, digits=2, absolute=True),
    Metric("long_s", "long", "prompt of 7,500 tokens, TTFT, s", "less"),
    Metric("long_decode_tokens_per_second", "long", "decode after it, tokens/s", "more"),
    Metric("long_peak_mb", "long", "peak RSS with it, MB", "less", digits=0),
    Metric("raw_prefill", "raw", "own benchmark: prefill of 512, tokens/s", "more"),
    Metric("raw_decode", "raw", "own benchmark: decode of 128, tokens/s", "more"),
)


@dataclass
class Turn:
    """What one contestant did in one round."""

    figures: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    """By workload: the share of the machine that other processes took meanwhile."""
    failures: dict[str, str] = field(default_factory=dict)
    """By workload that came to no figures: why."""


Round = Mapping[str, Turn]
"""By contestant."""


@dataclass(frozen=True)
class Spread:
    """Of several rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of nothing."""
        return cls(statistics.median(values), min(values), max(values), len(values)) if values else None


@dataclass(frozen=True)
class Row:
    """A metric over all rounds."""

    metric: Metric
    figures: Mapping[str, Spread]
    """By contestant; one that cannot do it is not there."""
    ratios: Mapping[str, Spread]
    """By peer, and :data:`BEST`."""
    disturbed: int
    """Rounds in which others were busy; they do not count, unless there is no other round."""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none, or nothing to compare."""
        found = self.figures.get(OURS) if self.metric.absolute else self.ratios.get(BEST)
        if self.metric.target is None or found is None:
            return None
        return (
            found.median >= self.metric.target if self.metric.better == "more" else found.median <= self.metric.target
        )


def rows(rounds: Sequence[Round], most_others: float) -> list[Row]:
    """One row for each metric that was measured.

    Args:
        rounds: in any order.
        most_others: share of the machine that others may take in a round that counts.
    """
    made = (_row(metric, rounds, most_others) for metric in METRICS)
    return [row for row in made if row.figures]


def markdown(found: Sequence[Row]) -> str:
    """A table: medians, and the ratio to the best peer with its range."""
    names = list(dict.fromkeys(name for row in found for name in row.figures))
    lines = [f"| | {' | '.join(names)} | ratio to the best peer | target |", "|---" * (len(names) + 3) + "|"]
    for row in found:
        cells = [_number(row.figures.get(name), row.metric.digits) for name in names]
        mark = f" ({row.disturbed} disturbed)" if row.disturbed else ""
        lines.append(f"| {row.metric.label}{mark} | {' | '.join(cells)} | {_ratio(row)} | {_target(row)} |")
    return "\n".join(lines)


def as_json(found: Sequence[Row], rounds: Sequence[Round]) -> dict[str, Any]:
    """Everything: the rows, and each round as it was measured."""
    return {
        "rows": {
            row.metric.name: {
                "figures": {name: asdict(spread) for name, spread in row.figures.items()},
                "ratios": {name: asdict(spread) for name, spread in row.ratios.items()},
                "target": row.metric.target,
                "met": row.met,
                "disturbed": row.disturbed,
            }
            for row in found
        },
        "rounds": [{name: asdict(turn) for name, turn in one.items()} for one in rounds],
    }


def _row(metric: Metric, rounds: Sequence[Round], most_others: float) -> Row:
    measured = [one for one in rounds if any(metric.name in turn.figures for turn in one.values())]
    quiet = [one for one in measured if _others(one, metric.workload) <= most_others]
    counted = [
        {name: turn.figures[metric.name] for name, turn in one.items() if metric.name in turn.figures}
        for one in quiet or measured
    ]
    names = dict.fromkeys(name for one in counted for name in one)
    spreads = {name: Spread.of([one[name] for one in counted if name in one]) for name in names}
    figures = {name: spread for name, spread in spreads.items() if spread}
    return Row(metric, figures, _ratios(metric, counted), len(measured) - len(quiet))


def _others(one: Round, workload: str) -> float:
    return max(turn.others.get(workload, 0.0) for turn in one.values())


def _ratios(metric: Metric, counted: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    if metric.better is None or metric.absolute:
        return {}
    best: Callable[[Sequence[float]], float] = max if metric.better == "more" else min
    values: dict[str, list[float]] = {}
    for one in counted:
        peers = {name: value for name, value in one.items() if name != OURS}
        if OURS in one and peers:
            for name, value in {**peers, BEST: best(list(peers.values()))}.items():
                values.setdefault(name, []).append(one[OURS] / value)
    spreads = {name: Spread.of(found) for name, found in values.items()}
    return {name: spread for name, spread in spreads.items() if spread}


def _number(spread: Spread | None, digits: int) -> str:
    return "" if spread is None else f"{spread.median:,.{digits}f}"


def _ratio(row: Row) -> str:
    found = row.ratios.get(BEST)
    return "" if found is None else f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _target(row: Row) -> str:
    if row.metric.target is None:
        return ""
    sign = "≥" if row.metric.better == "more" else "≤"
    verdict = {True: ", met", False: ", missed", None: ""}[row.met]
    return f"{sign} {row.metric.target:g}{verdict}"
