"""Runs a program that a model wrote, in a child process that may compute and nothing else.

What holds the child, from the outside in:

- a process and a session of its own, an empty environment (no secrets), an empty folder, no input but the program;
- limits on processor time, address space, open files, output, and on the time that passes;
- namespaces of its own for users and network where the kernel lets it have them;
- a filter of system calls (seccomp): no network, no other programs, no further processes, no signals, nothing opened
  for writing, nothing created, renamed or removed. Whatever else it does, it can read what the user can read.

The child (:mod:`edge.evaluation.sandbox_child`) refuses to begin where the filter cannot be had, or where the user is
root and stays it.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge.errors import UnavailableError

CHILD: Final = Path(__file__).with_name("sandbox_child.py")
MAX_OUTPUT: Final = 64 << 10
"""Bytes."""
_PATIENCE = 4
"""Seconds that may pass for each second of processor time, plus as many for the start."""
_SHOWN = 300


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_s: float = 5.0
    memory_mb: int = 512
    """Address space, Python's own included."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It came to its end without an exception."""
    reason: str


def run(program: str, limits: Limits) -> Outcome:
    """Run a Python program.

    Raises:
        UnavailableError: this machine cannot confine it.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="qwedge-code-") as folder, tempfile.TemporaryFile() as source:
        source.write(program.encode("utf-8", "replace"))
        source.seek(0)
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD), token, str(limits.cpu_s), str(limits.memory_mb)],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        ) as child:
            output = _output(child, time.monotonic() + _PATIENCE * (limits.cpu_s + 1))
    return _outcome(child.returncode, output, token)


def _output(child: subprocess.Popen[bytes], deadline: float) -> bytes:
    """What the child writes until it ends, its time has passed, or it has written more than it may; it is dead then."""
    assert child.stdout is not None
    pipe, output = child.stdout.fileno(), b""
    try:
        while len(output) <= MAX_OUTPUT:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(pipe, MAX_OUTPUT) if ready else b""
            if not piece:
                # Without a pipe it may still go on computing; its processor time is limited.
                if ready:
                    child.wait(max(0.0, deadline - time.monotonic()))
                break
            output += piece
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return output


def _outcome(status: int, output: bytes, token: str) -> Outcome:
    text = output.decode("utf-8", "replace").strip()
    _, found, verdict = text.rpartition(token)
    if found and verdict.startswith(" refused"):
        hint = "run as an ordinary user, on Linux with seccomp; or leave the suite out"
        raise UnavailableError(f"code cannot be confined here: {verdict.removeprefix(' refused: ')}", hint=hint)
    if found and status == 0:
        return Outcome(True, "runs")
    if len(output) > MAX_OUTPUT:
        return Outcome(False, "wrote more than it may")
    if status in {-signal.SIGXCPU, -signal.SIGKILL}:
        return Outcome(False, "used more time than it may")
    last = text.splitlines()[-1] if text else f"ended with status {status}"
    return Outcome(False, last[-_SHOWN:])
