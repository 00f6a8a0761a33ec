"""``qwedge eval``: how well does a bundle, or a server, do what it is for?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.commands import options
from edge.config import Settings
from edge.errors import ConfigError

if TYPE_CHECKING:  # these bring pydantic's models and yaml, which `qwedge --help` does without
    from edge.evaluation import Comparison, Report, Result, Suite, Target

EXIT_BELOW = 1
"""A score is below what was required."""
_URLS = ("http://", "https://")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


def evaluate(
    suite: Annotated[
        str | None, typer.Argument(metavar="[SUITE]", help="One of --list, or a YAML file; see docs/evaluation.md.")
    ] = None,
    *,
    bundle: options.Bundle = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="Evaluate this server of OpenAI's API instead.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The model, or MODEL:ADAPTER, that is asked for.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="B", help="Compare with this bundle or URL, which runs first.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE", help="Compare with the report in this file (--json).")
    ] = None,
    require: Annotated[
        float | None,
        typer.Option("--require", metavar="S", min=0, max=1, help="Exit with 1 if a smaller share of cases passes."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", metavar="D", min=0, max=1, help="Exit with 1 if the score falls by more than this."),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let a suite run code that the model writes, confined.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="N cases at most, spread over the suite.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="KEY=VALUE", help="Cases whose metadata say so; may be repeated."),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", metavar="N", min=1, max=64, help="Questions at once [default: slots].")
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="S", min=1, max=86400, help="Seconds that a server's answer may take.")
    ] = 600.0,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="The API key of --url and --against, on one line.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="FILE", help="Append each result to FILE; go on where it ends."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - is stdout.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as an HTML page.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--record", help="Write the score into the bundle's manifest, before it is signed.")
    ] = False,
    threads: options.Threads = None,
    config: options.Config = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the suites that come with qwedge and exit.")] = False,
) -> int:
    """Ask a bundle or a server the questions of a suite, and judge the answers.

    The score is the share of the cases that pass. Exits with 1 where it is below what --require or --max-drop want.
    """
    if show_list:
        _print_suites()
        return 0
    if suite is None:
        raise ConfigError("no suite is given", hint="qwedge eval --list shows those that come with qwedge")
    _check_targets(bundle, url, record=keep)
    _check_comparison(against, baseline, max_drop)
    for file in (resume, json_file, html_file):
        _check_writable(file)
    from edge.commands.loading import bundle_of
    from edge.evaluation import Report, check_comparable, check_recordable, compare, record

    chosen = _chosen(suite, limit, where or [])
    settings = options.settings(config, model__bundle=bundle, engine__threads=threads)
    if keep:
        check_recordable(bundle_of(settings))
    run = _Run(chosen, settings, model, parallel, timeout_s, _read_key(key_file), resume, allow_code)
    before = None
    if baseline is not None:
        before = Report.read(baseline)
        check_comparable(chosen, before)
    if against is not None:
        before = run.report(against)
    report = run.report(url)
    comparison = None if before is None else compare(report, before)
    if keep:
        record(bundle_of(settings), report)
    _write(report, comparison, json_file, html_file)
    if json_file is None or str(json_file) != "-":
        _print_report(report, comparison)
    return _gate(report, comparison, require, max_drop)


def _check_targets(bundle: Path | None, url: str | None, *, record: bool) -> None:
    if url is None:
        return
    if bundle is not None:
        raise ConfigError("--bundle and --url do not go together", hint="--against compares two")
    if record:
        raise ConfigError("--record is for bundles", hint="leave it or --url out")
    if not url.startswith(_URLS):
        raise ConfigError(f"--url {url} is no address of HTTP", hint="write --url http://HOST:PORT")


def _check_comparison(against: str | None, baseline: Path | None, max_drop: float | None) -> None:
    if against is not None and baseline is not None:
        raise ConfigError("--against and --baseline do not go together", hint="give one of them")
    if max_drop is not None and against is None and baseline is None:
        raise ConfigError("--max-drop needs something to compare with", hint="give --against or --baseline")


def _check_writable(file: Path | None) -> None:
    """Refuse a file that cannot be written, before hours of questions are asked for it."""
    if file is None or str(file) == "-":
        return
    place = file if file.exists() else file.parent
    if file.is_dir() or not place.exists() or not os.access(place, os.W_OK):
        raise ConfigError(f"{file} cannot be written", hint="choose another file, in a folder that exists")


@dataclass(frozen=True)
class _Run:
    """What all targets of one command line have in common."""

    suite: Suite
    settings: Settings
    model: str | None
    parallel: int | None
    timeout_s: float
    key: str | None
    resume: Path | None
    allow_code: bool

    def report(self, what: str | None) -> Report:
        """Evaluate an address or a bundle's folder; None is the configured bundle."""
        from edge.evaluation import ResultLog, evaluate

        with self._target(what) as target, _progress(target.name, len(self.suite.cases)) as tell:
            return evaluate(
                self.suite,
                target,
                allow_code=self.allow_code,
                parallel=self.parallel,
                log=ResultLog(self.resume) if self.resume else None,
                on_result=tell,
            )

    @contextmanager
    def _target(self, what: str | None) -> Iterator[Target]:
        from edge.commands.loading import bundle_of, load
        from edge.evaluation import service_target, url_target

        if what is not None and what.startswith(_URLS):
            parallel = self.parallel or 4
            with url_target(
                what, model=self.model, parallel=parallel, timeout_s=self.timeout_s, key=self.key
            ) as server:
                yield server
            return
        folder = bundle_of(self.settings) if what is None else Path(what)
        options.note(f"loading {folder}")
        with service_target(load(self.settings, bundle=folder), self.settings.engine.slots, self.model) as loaded:
            yield loaded


def _read_key(path: Path | None) -> str | None:
    """An API key; in a file, as command lines are for everyone to see."""
    try:
        key = None if path is None else path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        key = ""
    if key is None or (key and key.isprintable() and " " not in key):
        return key
    raise ConfigError(f"{path} holds no API key", hint="write the key into the file, and nothing else")


def _chosen(name: str, limit: int | None, where: list[str]) -> Suite:
    from edge.evaluation import load_suite

    suite = load_suite(name)
    conditions = {}
    for condition in where:
        key, equals, value = condition.partition("=")
        if not equals:
            raise ConfigError(f"--where {condition} has no value", hint="write --where language=de")
        conditions[key] = value
    if conditions:
        suite = suite.where(conditions)
    return suite if limit is None else suite.limited(limit)


@contextmanager
def _progress(name: str, total: int) -> Iterator[Any]:
    """A line on stderr that counts; where nobody watches, one line for every tenth of the cases."""
    done = passed = 0
    live = sys.stderr.isatty()

    def tell(result: Result) -> None:
        nonlocal done, passed
        done, passed = done + 1, passed + result.passed
        text = f"{name}: {done} of {total}, {passed} passed"
        if live:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif done == total or done % max(1, total // 10) == 0:
            options.note(text)

    try:
        yield tell
    finally:
        if live:
            print(file=sys.stderr)


def _write(report: Report, comparison: Comparison | None, json_file: Path | None, html_file: Path | None) -> None:
    from edge.evaluation import page

    if json_file is not None:
        value = report.as_json() | ({} if comparison is None else {"comparison": comparison.as_json()})
        if str(json_file) == "-":
            options.print_json(value)
        else:
            _write_file(json_file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    if html_file is not None:
        _write_file(html_file, page(report, comparison))


def _write_file(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="choose another file") from None


def _print_report(report: Report, comparison: Comparison | None) -> None:
    low, high = report.share.interval
    print(f"{report.suite}: {report.target}")
    print(f"score    {report.score:.1%}, {report.share.passed} of {report.share.count} cases ({low:.1%} to {high:.1%})")
    if report.num_errors:
        reason = next(result.error for result in report.results if result.error is not None)
        print(f"errors   {report.num_errors} cases got no answer, the first: {reason}")
    for key, shares in report.groups().items():
        print(f"{key:<8} {', '.join(f'{value} {share.passed}/{share.count}' for value, share in shares.items())}")
    for name, value in report.metrics().items():
        print(f"metric   {name} {value:.1%}")
    figures = report.figures()
    took = {"latency_ms_median": "ms", "tokens_per_second_median": "tokens/s", "completion_tokens": "tokens",
            "energy_j": "J"}  # fmt: skip
    if known := [f"{figures[name]:,.6g} {unit}" for name, unit in took.items() if figures[name] is not None]:
        print(f"took     {', '.join(known)}")
    if comparison is not None:
        low, high = comparison.interval
        print(f"against  {comparison.baseline}: {comparison.difference:+.1%} ({low:+.1%} to {high:+.1%}), ", end="")
        print(f"{len(comparison.gained)} gained, {len(comparison.lost)} lost, p {comparison.p_value:.2g}")
        for name, ids in (("gained", comparison.gained), ("lost", comparison.lost)):
            if ids:
                print(f"{name:<8} {', '.join(ids)}")


def _gate(report: Report, comparison: Comparison | None, require: float | None, max_drop: float | None) -> int:
    status = 0
    if require is not None and report.score < require:
        options.note(f"failed: the score {report.score:.4g} is below the required {require:g}")
        status = EXIT_BELOW
    if max_drop is not None and comparison is not None and comparison.difference < -max_drop:
        options.note(f"failed: the score fell by {-comparison.difference:.4g}, more than {max_drop:g}")
        status = EXIT_BELOW
    return status


def _print_suites() -> None:
    from edge.evaluation import built_in_suites, load_suite

    for name in built_in_suites():
        suite = load_suite(name)
        code = "; runs code, needs --allow-code" if suite.runs_code else ""
        print(f"{name:<9} {len(suite.cases):>4} cases  {suite.description}{code}")
