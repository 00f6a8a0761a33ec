"""One line of the report."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Status = Literal["ok", "warn", "fail"]
MIB: Final = 1 << 20
GIB: Final = 1 << 30


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    """``fail``: qwedge cannot serve here."""
    detail: str
    hint: str = ""
    """What to change; empty when there is nothing."""


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB"


def unseen(*paths: Path | None) -> bool:
    """Whether one of these files is a credential that systemd shows to the service alone, and so not to us."""
    relative = [path for path in paths if path is not None and not path.expanduser().is_absolute()]
    return "CREDENTIALS_DIRECTORY" not in os.environ and any(not path.exists() for path in relative)


UNSEEN_HINT: Final = "run it while the service runs, as its user: sudo -u qwedge qwedge doctor"
