"""``--require SUITE:SCORE``: what a bundle must be able to do before it is switched to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge.bundle import read_manifest
from edge.commands.options import note
from edge.errors import ConfigError, StoreError

if TYPE_CHECKING:  # these bring yaml, which `qwedge --help` does without
    from edge.evaluation import Suite
    from edge.store import Installed


def score_gates(requirements: Sequence[str], config: Path | None) -> tuple[Callable[[Installed], None], ...]:
    """Gates for :meth:`edge.store.Store.activate`, checked before anything begins.

    Args:
        requirements: ``SUITE:SCORE`` each: a suite's name or file, and the least share of its cases that must pass.
        config: the settings to evaluate with.

    Raises:
        ConfigError: one is written differently, or its suite cannot be used.
    """
    return tuple(_gate(*_parse(requirement), config) for requirement in requirements)


def _parse(requirement: str) -> tuple[Suite, str, float]:
    suite, _, text = requirement.rpartition(":")
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not suite or not 0 <= score <= 1:
        raise ConfigError(f"--require {requirement} is no SUITE:SCORE", hint="write --require factory:0.4")
    from edge.evaluation import load_suite

    found = load_suite(suite)
    if found.runs_code:
        raise ConfigError(f"{suite} executes code, which no gate may", hint=f"qwedge eval {suite} --allow-code")
    return found, suite, score


def _gate(suite: Suite, name: str, score: float, config: Path | None) -> Callable[[Installed], None]:
    def gate(installed: Installed) -> None:
        """Take the word of a trusted signature, or evaluate.

        Raises:
            StoreError: the score is below what is required, or there is none.
        """
        from edge.evaluation import recorded_score

        known = recorded_score(read_manifest(installed.path), suite) if installed.signed_by is not None else None
        if known is None:
            note(f"evaluating it: {name} must reach {score:g}")
            _evaluate(installed, name, score, config)
        elif known < score:
            raise _refused(installed, name, f"its manifest records {known:g}, {score:g} is required")

    return gate


def _evaluate(installed: Installed, suite: str, score: float, config: Path | None) -> None:
    """In a process of its own: should the memory not suffice, nothing else ends with it."""
    line = [sys.executable, "-m", "edge.cli", "eval", suite, "--bundle", os.fspath(installed.path)]
    line += ["--require", str(score), *(["--config", os.fspath(config)] if config else [])]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        told = [text for text in done.stderr.splitlines() if text.startswith(("failed: ", "error: "))]
        reason = told[-1].partition(": ")[2] if told else f"the evaluation ended with status {done.returncode}"
        raise _refused(installed, suite, reason)


def _refused(installed: Installed, suite: str, reason: str) -> StoreError:
    hint = f"what was active stays so; `qwedge eval {suite} --bundle {installed.path} --html FILE` shows the cases"
    return StoreError(f"{installed.name} does not pass {suite}: {reason}", hint=hint)
