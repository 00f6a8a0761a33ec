"""Commands of ``qwedge`` in this process: quicker than one of their own, and the heavy packages are loaded once."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import edge.cli


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


def forget_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what whoever runs the tests has set for himself."""
    for name in [name for name in os.environ if name.startswith("QWEDGE_")]:
        monkeypatch.delenv(name)


def command_runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *first: str) -> Run:
    """A function that runs the command of the words ``first`` and its own; keywords are set in the environment."""
    forget_settings(monkeypatch)

    def run(*args: str | Path, stdin: str = "", **environment: str) -> Done:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = edge.cli.run([*first, *map(str, args)])
        return Done(status, *capsys.readouterr())

    return run
