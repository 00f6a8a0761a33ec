"""Asks a target every question of a suite, several at once, and judges the answers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from edge.errors import ConfigError, QwedgeError, UnavailableError
from edge.evaluation.report import Report, Result
from edge.evaluation.suite import Case, Suite
from edge.evaluation.target import Target

MAX_PARALLEL = 64
OnResult = Callable[[Result], None]
"""Called with each result as it is there, on the thread that evaluates; what it raises ends the evaluation."""


def evaluate(
    suite: Suite,
    target: Target,
    *,
    allow_code: bool = False,
    parallel: int | None = None,
    log: ResultLog | None = None,
    on_result: OnResult | None = None,
) -> Report:
    """Run a suite.

    Args:
        suite: the cases.
        target: who answers.
        allow_code: whether what the model writes may be executed; only some suites ask for it.
        parallel: questions at once; None = as many as the target works on.
        log: keeps the results, and has those of an earlier run that was interrupted.
        on_result: gets what is found meanwhile.

    Raises:
        ConfigError: the suite executes code, which is not allowed.
        UnavailableError: the target is gone, or this machine cannot confine code.
    """
    if suite.runs_code and not allow_code:
        hint = "--allow-code allows it: in a child process without network, files to write or other programs"
        raise ConfigError(f"the suite {suite.name} executes code that the model writes", hint=hint)
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    found = log.known(suite, target) if log else {}
    for result in found.values():
        _tell(on_result, result)
    open_cases = [case for case in suite.cases if case.id not in found]
    for result in _results(open_cases, target, min(parallel or target.parallel, MAX_PARALLEL)):
        found[result.id] = result
        if log and result.error is None:
            log.append(target, result)
        _tell(on_result, result)
    return Report(
        suite=suite.name,
        description=suite.description,
        suite_digest=suite.digest,
        target=target.name,
        facts=target.facts,
        started=started,
        seconds=round(time.monotonic() - began, 3),
        results=tuple(found[case.id] for case in suite.cases),
    )


def _tell(on_result: OnResult | None, result: Result) -> None:
    if on_result is not None:
        on_result(result)


def _results(cases: list[Case], target: Target, parallel: int) -> Iterator[Result]:
    """Results in the order in which they come."""
    pool = ThreadPoolExecutor(parallel, "evaluation")
    try:
        for future in as_completed([pool.submit(_result, case, target) for case in cases]):
            yield future.result()
    finally:
        # Whoever leaves early stops the target next, and with it what still runs.
        pool.shutdown(wait=False, cancel_futures=True)


def _result(case: Case, target: Target) -> Result:
    try:
        return Result.judged(case, target.answer(case.body))
    except UnavailableError:
        raise
    except QwedgeError as error:
        return Result.failed(case, str(error))


class ResultLog:
    """A file of results, one on each line, that an interrupted evaluation goes on from.

    Results of several targets and suites may be in one file: each line says whose it is. Answers that failed are not
    kept, so that they are asked for again.

    Args:
        path: the file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def known(self, suite: Suite, target: Target) -> dict[str, Result]:
        """Results that are there already, by the ids of their cases.

        Raises:
            ConfigError: the file cannot be read.
        """
        digests, whose = {case.id: case.digest for case in suite.cases}, _identity(target.facts)
        found = {}
        for line in self._lines():
            try:
                entry = json.loads(line)
                result = Result.from_json(entry["result"]) if entry["target"] == whose else None
            except (ValueError, LookupError, TypeError):
                continue  # the last line of a run that was cut off
            if result is not None and digests.get(result.id) == result.digest:
                found[result.id] = result
        return found

    def append(self, target: Target, result: Result) -> None:
        """Keep a result, on the disk before the next question's.

        Raises:
            ConfigError: the file cannot be written.
        """
        line = json.dumps({"target": _identity(target.facts), "result": asdict(result)}, ensure_ascii=False)
        try:
            with self._path.open("ab+") as file:
                # A line that was cut off must not swallow the next one.
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}", hint="choose another file") from None

    def _lines(self) -> list[bytes]:
        try:
            return self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error.strerror}", hint="choose another file") from None


def _identity(facts: Mapping[str, Any]) -> str:
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
