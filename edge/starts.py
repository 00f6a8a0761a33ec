"""How the service's last starts went, in one small file: what safe mode and `qwedge doctor` go by.

A start is noted before anything is loaded, and taken back once the service has worked for a while or was asked to end.
What is left in the file are starts in a row that ended by themselves. They count as long as the machine runs: a power
cut is nobody's fault, and who turns a device off and on wants it to try again.
"""

from __future__ import annotations

import json
import logging
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.durable import replace_durably
from edge.store.disk import locked

log = logging.getLogger(__name__)

MAX_DEATHS: Final = 3
"""Starts in a row that ended by themselves; the next one is in safe mode."""
RETRY_AFTER_S: Final = 3600.0
"""Seconds in safe mode after which a normal start is tried; twice as long after each that ended by itself."""
MAX_RETRY_AFTER_S: Final = 24 * 3600.0


class Starts(BaseModel):
    """What the file says; changes make new ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    bundle: str = ""
    """What the last start served."""
    boot: str = ""
    """Differs between two starts of the machine."""
    unproven: Annotated[int, Field(ge=0)] = 0
    """Starts in a row that neither worked for a while nor were asked to end, the last one included."""
    retries: Annotated[int, Field(ge=0)] = 0
    """Normal starts that safe mode has tried by itself since one worked."""
    ready_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Seconds that the last good start took until it answered."""


def read_starts(folder: Path) -> Starts:
    """What is known of the last starts; nothing where the file is missing, damaged, or cannot be read."""
    try:
        return Starts.model_validate_json((folder / "starts.json").read_bytes())
    except (OSError, ValidationError):
        return Starts()


def boot_id() -> str:
    """Differs between two starts of the machine; empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class StartCounter:
    """Counts the starts of one process after another in a folder.

    A second process beside the first one counts nothing: its starts would look like crashes of the first. Where the
    disk refuses, nothing is counted either.

    Args:
        folder: made where it is missing; of one device alone. None counts nothing.
        boot: tells this start of the machine from others.
    """

    def __init__(self, folder: Path | None, boot: str) -> None:
        self._folder = folder
        self._boot = boot
        self._known = Starts()
        self._safe = self._retrying = False
        self._held = ExitStack()
        self._writing = threading.Lock()

    @property
    def is_retry(self) -> bool:
        """Whether this is a normal start that safe mode tries."""
        return self._known.retries > 0 and not self._safe

    @property
    def retry_after_s(self) -> float:
        """Seconds in safe mode after which to try a normal start."""
        return min(RETRY_AFTER_S * 2.0 ** min(self._known.retries, 32), MAX_RETRY_AFTER_S)

    def begin(self, bundle: str) -> int:
        """Note a start, until :meth:`works`, :meth:`stopped` or the end of the process.

        Args:
            bundle: what is going to be served; those of another one do not count.

        Returns:
            How many starts in a row before this one ended by themselves.
        """
        if self._folder is None:
            return 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._held.enter_context(locked(self._folder / "starts.lock", wait=False)):
                return 0
            self._known, now = read_starts(self._folder), {"bundle": bundle, "boot": self._boot}
            same = (self._known.bundle, self._known.boot) == (bundle, self._boot)
            deaths = self._known.unproven if same else 0
            self._safe = deaths >= MAX_DEATHS
            retries = self._known.retries if same else 0
            self._write(
                self._folder, self._known.model_copy(update={**now, "unproven": deaths + 1, "retries": retries})
            )
        except OSError as error:
            log.warning("starts are not counted, %s cannot be written: %s", self._folder, error.strerror)
            self._known, self._safe = Starts(), False
            return 0
        return deaths

    def works(self, ready_s: float | None = None) -> None:
        """The service has worked for a while, or is asked to end: this start and those before are no crashes.

        On any thread.

        Args:
            ready_s: seconds that the start took; None where it never answered.
        """
        with self._writing:
            if self._known.unproven == 0 or self._retrying:
                return
            took = {} if ready_s is None else {"ready_s": ready_s}
            self._note({"unproven": 0, "retries": self._known.retries if self._safe else 0, **took})

    def retry(self) -> None:
        """The next start is a normal one, and leads back to safe mode if it ends by itself; on any thread."""
        with self._writing:
            self._note({"unproven": MAX_DEATHS - 1, "retries": self._known.retries + 1})
            self._retrying = True

    def close(self) -> None:
        """Let another process count."""
        self._held.close()

    def _note(self, update: dict[str, object]) -> None:
        if self._folder is None:
            return
        try:
            self._write(self._folder, self._known.model_copy(update=update))
        except OSError as error:
            log.warning("%s cannot be written: %s", self._folder, error.strerror)

    def _write(self, folder: Path, starts: Starts) -> None:
        replace_durably(folder / "starts.json", json.dumps(starts.model_dump(), indent=2).encode() + b"\n")
        self._known = starts
