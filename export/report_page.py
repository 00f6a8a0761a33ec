"""The page of a report: a table, and a plot of size against divergence, in HTML without scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Final

from export.report import PAGE, ROWS, QualityReport, Row

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #fff; --line: #ccd3da; --own: #1f5fc4; --peer: #8a4b08; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #14181c; --line: #3b444d; --own: #7fb0ff;
  --peer: #f0b070; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; } caption { text-align: left; }
th, td { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
.grid { stroke: var(--line); } .own { fill: var(--own); } .peer { fill: none; stroke: var(--peer); stroke-width: 2; }
"""
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
_COLUMNS: Final = ("recipe", "MB on disk", "MB per token", "KL, mean", "KL, 99.9%", "same first choice", "perplexity")
_WIDTH, _HEIGHT = 900, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 170, 20, 50
_NAME_WIDTH, _LINE = 150, 15
"""Of the names beside marks."""


@dataclass(frozen=True)
class Point:
    """A mark of the plot."""

    name: str
    megabytes: float
    """Of weights on disk."""
    kl: float
    """Mean divergence in nats."""
    is_peer: bool = False


def write_report(folder: Path, report: QualityReport) -> None:
    """Write rows and page into a folder, each of them whole or not at all.

    Raises:
        OSError: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((ROWS, report.json()), (PAGE, page(report))):
        scratch = folder / f".{name}.partial"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(folder / name)


def page(report: QualityReport) -> str:
    """The whole page."""
    peers, note = _peers(report)
    points = [Point(row.name, row.weight_bytes / 1e6, row.quality.kl) for row in report.rows if row.quality.kl > 0]
    title = f"What quantization costs {report.name}"
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n",
            f"<h1>{escape(title)}</h1>\n",
            "<p>Each row is an export, compared with the same weights in float32 on a text that no export has seen. ",
            "Where the source was quantized itself, this is what the export adds.</p>\n",
            *_table(report.rows),
            "<h2>Size against divergence</h2>\n",
            *(_plot([*points, *peers]) if points else ("<p>There is nothing to draw yet.</p>\n",)),
            f"<p>Hollow marks: {escape(note)}.</p>\n" if peers else "",
            "</main>\n</body>\n</html>\n",
        ]
    )


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield '<div class="wide"><table>\n<caption>KL in nats; perplexity beside that of the float32 model</caption>\n<tr>'
    yield "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS) + "</tr>\n"
    for row in rows:
        found = row.quality
        cells = (
            f"{row.weight_bytes / 1e6:,.0f}",
            f"{row.weight_bytes_per_token / 1e6:,.0f}",
            f"{found.kl:.4f}",
            f"{found.kl_p999:.3f}",
            f"{found.top1:.1%}",
            f"{found.perplexity:.3f} / {found.reference_perplexity:.3f} ({found.perplexity_change:+.1%})",
        )
        yield f'<tr><th scope="row">{escape(row.name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
    yield "</table></div>\n"


def _peers(report: QualityReport) -> tuple[list[Point], str]:
    """What others cost the same model, where it was measured, and how."""
    for entry in json.loads(files("export").joinpath("peers.json").read_text(encoding="utf-8")):
        if (entry["model_type"], entry["parameter_count"]) == (report.model_type, report.parameter_count):
            points = [Point(**point, is_peer=True) for point in entry["points"]]
            return points, f"{entry['model']}, {entry['note']}"
    return [], ""


class _Axis:
    """A logarithmic scale over some values, with room around them."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        self._low, self._high = math.log(min(values) / 1.15), math.log(max(values) * 1.15)
        self._start, self._stop = start, stop

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        share = (math.log(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten, or all whole multiples where those would be few."""
        few = self._ticks((1, 2, 5))
        return few if len(few) > 2 else self._ticks(range(1, 10))

    def _ticks(self, factors: Iterable[int]) -> list[float]:
        powers = range(math.floor(self._low / math.log(10)), math.ceil(self._high / math.log(10)) + 1)
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        return [tick for tick in ticks if self._low <= math.log(tick) <= self._high]


def _plot(points: Sequence[Point]) -> Iterator[str]:
    x = _Axis([point.megabytes for point in points], _LEFT, _WIDTH - _RIGHT)
    y = _Axis([point.kl for point in points], _HEIGHT - _BOTTOM, _TOP)
    words = "; ".join(f"{point.name}: {point.megabytes:.0f} MB, {point.kl:.4f} nats" for point in points)
    yield f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(words)}">\n'
    for tick in x.ticks():
        at = x.place(tick)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        yield f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick:,.0f}</text>\n'
    for tick in y.ticks():
        at = y.place(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>\n'
    yield f'<text x="{_LEFT}" y="{_HEIGHT - 8}">MB of weights on disk and mean KL in nats; lower left is better</text>'
    places = [(x.place(point.megabytes), y.place(point.kl)) for point in points]
    for point, place, label in zip(points, places, _labels(places), strict=True):
        yield _mark(point, place, label)
    yield "</svg>\n"


def _labels(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where the names of marks begin: to the right, and moved down where they would cover each other."""
    labels = [(0.0, 0.0)] * len(places)
    done: list[tuple[float, float]] = []
    for x, y, index in sorted(((x, y, index) for index, (x, y) in enumerate(places)), key=lambda mark: mark[1]):
        above = [height for other, height in done if abs(other - x) < _NAME_WIDTH]
        height = max([y, *(height + _LINE for height in above)])
        done.append((x, height))
        # Behind marks that stand in the way.
        beside = [other for other, level in places if x <= other < x + _LINE and abs(level - height) < _LINE]
        labels[index] = (max([x, *beside]), height)
    return labels


def _mark(point: Point, place: tuple[float, float], label: tuple[float, float]) -> str:
    x, y = place
    shape = (
        f'<rect class="peer" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
        if point.is_peer
        else f'<circle class="own" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    )
    return f'\n{shape}<text x="{label[0] + 10:.1f}" y="{label[1] + 4:.1f}">{escape(point.name)}</text>'
