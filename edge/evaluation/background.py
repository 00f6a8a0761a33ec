"""Evaluations beside the daily work: one at a time, one question at a time, results kept for comparison.

A run asks the service that serves everybody else, and waits in the same queue: others are delayed by one short answer
at most. Reports are files in a folder, the oldest of which go.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

from edge.durable import replace_durably
from edge.errors import ConflictError, QwedgeError, RequestError
from edge.evaluation.compare import compare
from edge.evaluation.report import Report, Result
from edge.evaluation.run import evaluate
from edge.evaluation.suite import Suite, built_in_suites, load_suite
from edge.evaluation.target import ServiceTarget, Target
from edge.service import Service

log = logging.getLogger(__name__)

MAX_REPORTS: Final = 50
"""Reports that are kept."""
_ID: Final = re.compile(r"\d{8}-\d{9}-[a-z0-9_-]{1,64}-[0-9a-f]{4}")


class _CancelledByUserError(Exception):
    """Ends a run from within."""


@dataclass
class _Run:
    """The run that is under way, or the last one."""

    id: str
    suite: Suite
    target: Target
    state: str = "running"
    """``running``, ``done``, ``cancelled`` or ``failed``."""
    error: QwedgeError | None = None
    results: list[Result] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)


class BackgroundEvaluations:
    """Runs suites against a service; see :class:`edge.http.routes.evaluation.Evaluations`.

    Args:
        service: answers.
        folder: where reports are kept; made when there is one.
    """

    def __init__(self, service: Service, folder: Path) -> None:
        self._service = service
        self._folder = folder
        self._lock = threading.Lock()
        self._run: _Run | None = None  # guarded by _lock
        self._suite = cache(load_suite)

    def overview(self) -> dict[str, Any]:
        """What can be run, and what was."""
        suites = [self._suite(name) for name in built_in_suites()]
        run = self._run
        return {
            "suites": [
                {
                    "name": each.name,
                    "description": each.description,
                    "cases": len(each.cases),
                    "runs_code": each.runs_code,
                }
                for each in suites
            ],
            "running": _progress(run) if run is not None and run.state == "running" else None,
            "runs": [{"id": path.stem, **_summary(path)} for path in self._paths()],
        }

    def start(self, name: str, limit: int | None) -> dict[str, Any]:
        """Begin a run in the background.

        Args:
            name: of a suite that comes with qwedge.
            limit: most cases of it; None = all.

        Raises:
            RequestError: there is no such suite, or it executes code.
            ConflictError: another run is under way.
        """
        if name not in built_in_suites():
            raise RequestError(
                "there is no such suite", hint=f"there are {', '.join(built_in_suites())}", param="suite"
            )
        suite = self._suite(name)
        if suite.runs_code:
            hint = f"run it on the command line: qwedge eval {name} --allow-code"
            raise RequestError("suites that execute code do not run over HTTP", hint=hint, param="suite")
        with self._lock:
            if self._run is not None and self._run.state == "running":
                raise ConflictError("another evaluation is under way", hint="wait for its end, or cancel it")
            suite = suite if limit is None else suite.limited(limit)
            run = _Run(_new_id(name), suite, ServiceTarget(self._service, parallel=1))
            self._run = run
        threading.Thread(target=self._evaluate, args=(run,), name="evaluation", daemon=True).start()
        return _progress(run)

    def get(self, run_id: str, baseline_id: str | None) -> dict[str, Any]:
        """A run with its cases, and how it compares with another one.

        Raises:
            RequestError: there is no such run (404).
            ConfigError: the two have no case in common.
        """
        run = self._run
        if run is not None and run.id == run_id and run.state != "done":
            return {**_progress(run), "cases": [_case(each) for each in list(run.results)], "comparison": None}
        report = self._report(run_id)
        baseline = None if baseline_id is None else self._report(baseline_id)
        return {
            "id": run_id,
            "state": "done",
            "done": len(report.results),
            "total": len(report.results),
            "error": None,
            **report.summary(),
            "figures": report.figures(),
            "cases": [_case(each) for each in report.results],
            "comparison": None if baseline is None else compare(report, baseline).as_json(),
        }

    def cancel(self, run_id: str) -> None:
        """End a run after the question that is being answered, or forget the report of a finished one.

        Raises:
            RequestError: there is no such run (404).
        """
        run = self._run
        if run is not None and run.id == run_id and run.state == "running":
            run.cancelled.set()
            return
        self._path(run_id).unlink()

    def _evaluate(self, run: _Run) -> None:
        model = self._service.model

        def take(result: Result) -> None:
            if self._service.model is not model:
                hint = "run it again, with the model that is served now"
                raise ConflictError("the model was switched in the middle", hint=hint)
            run.results.append(result)
            if run.cancelled.is_set():
                raise _CancelledByUserError

        state = "failed"
        try:
            self._save(run.id, evaluate(run.suite, run.target, parallel=1, on_result=take))
            state = "done"
        except _CancelledByUserError:
            state = "cancelled"
        except QwedgeError as error:
            run.error = error
        except OSError as error:
            run.error = QwedgeError(f"the report was not kept: {error.strerror}", hint="is the disk full?")
        finally:
            log.info("evaluation %s: %s after %d of %d cases", run.id, state, len(run.results), len(run.suite.cases))
            run.state = state

    def _save(self, run_id: str, report: Report) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = json.dumps(report.as_json(), ensure_ascii=False)
        replace_durably(self._folder / f"{run_id}.json", text.encode("utf-8", errors="replace"))
        for path in self._paths()[MAX_REPORTS:]:
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        """Reports, the newest first: ids begin with the time."""
        return sorted((path for path in self._folder.glob("*.json") if _ID.fullmatch(path.stem)), reverse=True)

    def _path(self, run_id: str) -> Path:
        path = self._folder / f"{run_id}.json"
        if not (_ID.fullmatch(run_id) and path.is_file()):
            error = RequestError("there is no such evaluation", hint="see GET /v1/evaluations", param="id")
            error.status, error.code = 404, "not_found"
            raise error
        return path

    def _report(self, run_id: str) -> Report:
        return Report.read(self._path(run_id))


def _new_id(name: str) -> str:
    """The time in milliseconds, so that ids sort as runs began; and something that no other one has."""
    now = time.time_ns() // 1_000_000
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now // 1000))}{now % 1000:03}-{name}-{secrets.token_hex(2)}"


def _describe(suite: Suite) -> dict[str, Any]:
    return {
        "name": suite.name,
        "description": suite.description,
        "cases": len(suite.cases),
        "runs_code": suite.runs_code,
    }


def _progress(run: _Run) -> dict[str, Any]:
    results = list(run.results)
    error = run.error
    return {
        "id": run.id,
        "suite": run.suite.name,
        "target": run.target.name,
        "state": run.state,
        "done": len(results),
        "total": len(run.suite.cases),
        "passed": sum(result.passed for result in results),
        "error": None if error is None else {"message": error.message, "hint": error.hint},
    }


def _summary(path: Path) -> Mapping[str, Any]:
    """A report without its cases; nothing of one that cannot be read."""
    try:
        return _read_summary(path, path.stat().st_mtime_ns)
    except (QwedgeError, OSError):
        return {}


@lru_cache(MAX_REPORTS * 2)
def _read_summary(path: Path, _changed_ns: int) -> Mapping[str, Any]:
    return Report.read(path).summary()


def _case(result: Result) -> dict[str, Any]:
    return {
        "id": result.id,
        "digest": result.digest,
        "description": result.description,
        "question": result.question,
        "passed": result.passed,
        "points": result.points,
        "answer": None if result.answer is None else result.answer.text,
        "error": result.error,
        "reasons": [verdict.reason for verdict in result.verdicts if not verdict.passed],
    }
