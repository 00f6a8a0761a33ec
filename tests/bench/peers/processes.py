"""Children that never outlive the block they run in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge.errors import UnavailableError

_PATIENCE_S = 900.0
_STOP_S = 20.0


@contextmanager
def process(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, *, pipes: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a group of its own, so that Ctrl-C reaches us alone and we end it."""
    pipe = subprocess.PIPE if pipes else None
    with (
        log.open("ab") as output,
        subprocess.Popen(
            command,
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or output,
            stderr=output,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            continue
        return


def json_of(command: Sequence[str], log: Path) -> Any:
    """What a program prints as JSON."""
    with process(command, log, pipes=True) as child:
        output = child.communicate(timeout=_PATIENCE_S)[0]
        if child.returncode:
            raise UnavailableError(f"{command[0]} failed", hint=f"see the end of {log}")
    return json.loads(output)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
