"""A report as one HTML page: no scripts, nothing from elsewhere, readable in the dark, by keyboard and by ear.

Everything that comes from a suite or a model is escaped, and a policy in the page forbids what would get through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import Final

from edge import __version__
from edge.evaluation.compare import Comparison
from edge.evaluation.report import Report, Result, Share

SHOWN_CHARS: Final = 4000
"""Of a question or an answer."""
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #ffffff; --soft: #f2f4f6; --line: #ccd3da;
  --good: #17693a; --bad: #a8241d; --bar: #3d7bd9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #14181c; --soft: #1e242a; --line: #3b444d;
  --good: #6fd196; --bad: #ff8f86; --bar: #6ea4f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } .big { font-size: 2.4rem; font-weight: 650; line-height: 1.2; }
.wide { overflow-x: auto; } table { border-collapse: collapse; } caption { text-align: left; font-weight: 600;
  white-space: nowrap; }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
meter { width: 9rem; } .good { color: var(--good); } .bad { color: var(--bad); }
details { border-bottom: 1px solid var(--line); padding: .25rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; } summary:focus-visible { outline: 3px solid var(--bar); }
pre { background: var(--soft); padding: .6rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .9rem/1.4 ui-monospace, monospace; }
.verdict { font-weight: 650; display: inline-block; min-width: 4.5rem; }
"""
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
_FIGURES: Final = {
    "latency_ms_median": ("latency, median", "ms"),
    "latency_ms_p95": ("latency, 95%", "ms"),
    "ttft_ms_median": ("first token, median", "ms"),
    "tokens_per_second_median": ("decoding, median", "tokens/s"),
    "prompt_tokens": ("tokens of prompts", ""),
    "completion_tokens": ("tokens of answers", ""),
    "energy_j": ("energy", "J"),
}


def page(report: Report, comparison: Comparison | None = None) -> str:
    """The whole page."""
    title = escape(f"{report.suite}: {report.target}")
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n",
            f"<h1>{title}</h1>\n<p>{escape(report.description)}</p>\n",
            *_score(report),
            *(_comparison(comparison) if comparison else ()),
            *_groups(report),
            *_took(report),
            *_cases(report, comparison),
            f"</main>\n<footer><p>qwedge {escape(__version__)}, {escape(report.started)}, ",
            f"suite {escape(report.suite_digest[:16])}</p></footer>\n</body>\n</html>\n",
        ]
    )


def _score(report: Report) -> Iterator[str]:
    share = report.share
    low, high = share.interval
    yield f'<p class="big">{share.value:.1%}</p>\n'
    yield f"<p>{share.passed} of {share.count} cases passed; with other cases of this kind it would be "
    yield f"{low:.1%} to {high:.1%} (95%). Points: {report.points:.1%}.</p>\n"
    if report.num_errors:
        yield f'<p class="bad">{report.num_errors} cases got no answer.</p>\n'


def _comparison(found: Comparison) -> Iterator[str]:
    low, high = found.interval
    yield f"<h2>Against {escape(found.baseline)}</h2>\n"
    yield f"<p>{found.difference:+.1%} over {found.cases} cases ({low:+.1%} to {high:+.1%}, 95%): "
    yield f"{found.score:.1%} now, {found.baseline_score:.1%} then. "
    yield f"{len(found.gained)} gained, {len(found.lost)} lost; "
    yield f"if neither were better, a split like this would have a probability of {found.p_value:.2g}.</p>\n"


def _groups(report: Report) -> Iterator[str]:
    for key, shares in report.groups().items():
        yield f'<h2>By {escape(key)}</h2>\n<div class="wide"><table>\n<caption>Cases that passed</caption>\n'
        yield f'<tr><th scope="col">{escape(key)}</th><th scope="col">passed</th><th scope="col">share</th></tr>\n'
        for value, share in shares.items():
            yield f'<tr><th scope="row">{escape(value)}</th><td class="number">{share.passed} of {share.count}</td>'
            yield f"<td>{_meter(share)} {share.value:.0%}</td></tr>\n"
        yield "</table></div>\n"
    if metrics := report.metrics():
        rows = ((name, f"{value:.1%}") for name, value in metrics.items())
        yield f"<h2>Metrics</h2>\n{_table('Mean score of the assertions of that name', rows)}"


def _meter(share: Share) -> str:
    return f'<meter min="0" max="1" value="{share.value:.4f}" aria-hidden="true"></meter>'


def _took(report: Report) -> Iterator[str]:
    figures = report.figures()
    rows = [
        (label, f"{value:,.{0 if value >= 100 or isinstance(value, int) else 1}f} {unit}".strip())
        for name, (label, unit) in _FIGURES.items()
        if (value := figures[name]) is not None
    ]
    rows += [(key, str(value)) for key, value in report.facts.items() if value is not None]
    yield f"<h2>Run</h2>\n{_table('What the answers took, and what was evaluated', rows)}"


def _table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>\n' for name, text in rows)
    return f'<div class="wide"><table>\n<caption>{escape(caption)}</caption>\n{cells}</table></div>\n'


def _cases(report: Report, comparison: Comparison | None) -> Iterator[str]:
    lost = frozenset(comparison.lost if comparison else ())
    gained = frozenset(comparison.gained if comparison else ())
    for passed, title in ((False, "Cases that failed"), (True, "Cases that passed")):
        results = [result for result in report.results if result.passed is passed]
        if results:
            yield f"<h2>{title} ({len(results)})</h2>\n"
        for result in results:
            news = ", lost" if result.id in lost else ", gained" if result.id in gained else ""
            yield from _case(result, news)


def _case(result: Result, news: str) -> Iterator[str]:
    word, kind = ("passed", "good") if result.passed else ("failed", "bad")
    label = result.description or result.question.strip().rpartition("\n")[2][:120]
    yield f'<details><summary><span class="verdict {kind}">{word}{news}</span> {escape(result.id)}: {escape(label)}'
    yield "</summary>\n"
    yield f"<p>Question</p><pre>{_shown(result.question)}</pre>\n"
    if result.answer is None:
        yield f'<p class="bad">{escape(result.error or "")}</p>\n'
    else:
        took = [f"{result.answer.latency_ms:.0f} ms"]
        if result.answer.completion_tokens is not None:
            took.append(f"{result.answer.completion_tokens} tokens")
        if result.answer.energy_j is not None:
            took.append(f"{result.answer.energy_j:.1f} J")
        yield f"<p>Answer ({', '.join(took)})</p><pre>{_shown(result.answer.text)}</pre>\n"
    yield "<ul>\n"
    for verdict in result.verdicts:
        word, kind = ("holds", "good") if verdict.passed else ("fails", "bad")
        yield f'<li><span class="{kind}">{word}</span>: {escape(verdict.type)}, {_shown(verdict.reason)}</li>\n'
    yield "</ul></details>\n"


def _shown(text: str) -> str:
    return escape(text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]} ...")
