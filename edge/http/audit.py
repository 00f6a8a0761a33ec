"""The audit log: who asked for what and when, one JSON line a request, never a text.

Writing is a thread's business: a slow disk must not hold up answers. What waits to be written is bounded; what does not
fit, or what the disk refuses, is counted, and the count is the next line that can be written.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from starlette.types import Scope

from edge.errors import ConfigError
from edge.http.caller import Exchange

log = logging.getLogger(__name__)

MAX_WAITING: Final = 10_000
"""Lines that wait to be written."""
NUM_KEPT: Final = 4
"""Full files that are kept beside the present one."""
MAX_PATH: Final = 200
"""Characters of a path that are written."""
_MAX_BATCH: Final = 256
_CLIENT_LEFT: Final = 499

_Line = dict[str, Any]


class AuditLog:
    """The log between :meth:`start` and :meth:`stop`; :meth:`record` never waits.

    Args:
        path: of the present file; full ones get ``.1`` (the newest) to ``.4``.
        max_bytes: after which a file is full.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._waiting: queue.Queue[_Line | None] = queue.Queue(MAX_WAITING)
        self._num_refused = 0  # lines that found no room; changed on the event loop's thread only
        self._num_failed = 0  # lines that the disk refused; the writer's thread only, like those below
        self._num_told = 0
        self._problem: str | None = None
        self._descriptor = -1
        self._thread: threading.Thread | None = None

    @property
    def problem(self) -> str | None:
        """Why nothing can be written, in words; None where all is well."""
        return None if self._problem is None else f"the audit log cannot be written: {self._problem}"

    def start(self) -> None:
        """Open the file and start writing.

        Raises:
            ConfigError: it cannot be opened.
        """
        try:
            self._open()
        except OSError as error:
            hint = "log.audit names a file in a folder that qwedge may write to"
            raise ConfigError(f"{self._path} cannot be opened: {error.strerror}", hint=hint) from None
        self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what waits and close the file."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None
        self._close()

    def record(self, scope: Scope, exchange: Exchange, status: int | None, seconds: float) -> None:
        """Note a request that has been answered, or whose client left before: status None."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": exchange.id,
            "key": exchange.caller.name or None,
            "address": scope["client"][0] if scope["client"] else None,
            "method": scope["method"],
            "path": scope["raw_path"][:MAX_PATH].decode("ascii", "replace"),
            "model": exchange.model or None,
            "prompt_tokens": exchange.num_prompt_tokens,
            "output_tokens": exchange.num_output_tokens,
            "status": _CLIENT_LEFT if status is None else status,
            "duration_s": round(seconds, 3),
        }
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._num_refused += 1

    # --- the writer's thread ----------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        while True:
            batch = self._gather()
            lines = [line for line in batch if line is not None]
            try:
                self._write(lines)
            except OSError as error:
                self._fail(error, len(lines))
            else:
                self._recover()
            if None in batch:
                return

    def _gather(self) -> list[_Line | None]:
        """What waits, or what comes next."""
        batch = [self._waiting.get()]
        while len(batch) < _MAX_BATCH:
            try:
                batch.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return batch

    def _write(self, lines: list[_Line]) -> None:
        if self._descriptor < 0:
            self._open()
        if (num_lost := self._num_refused + self._num_failed) > self._num_told:
            lost = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "lost": num_lost - self._num_told}
            lines = [lost, *lines]
        data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        while data:
            data = data[os.write(self._descriptor, data) :]
        self._num_told = num_lost
        if os.fstat(self._descriptor).st_size >= self._max_bytes:
            self._rotate()

    def _fail(self, error: OSError, num_lines: int) -> None:
        self._num_failed += num_lines
        self._close()
        if self._problem is None:
            log.error("the audit log cannot be written: %s; lines are lost until it can be", error.strerror)
        self._problem = error.strerror or str(error)

    def _recover(self) -> None:
        if self._problem is not None:
            log.warning("the audit log can be written again")
            self._problem = None

    def _rotate(self) -> None:
        self._close()
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, NUM_KEPT + 1))]
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                newer.rename(older)
        self._open()

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")  # a full disk or a power cut has ended a line in its middle

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
