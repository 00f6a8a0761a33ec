"""What stands in the small files of Linux's ``/sys``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

SYS: Final = Path("/sys")


def read_number(file: Path) -> int | None:
    """A number; None where there is none: a sensor that is switched off, refuses, or tells nonsense."""
    with suppress(OSError, ValueError):
        return int(file.read_text(encoding="ascii"))
    return None


def read_text(file: Path) -> str:
    """A line; empty where there is none."""
    with suppress(OSError, ValueError):
        return file.read_text(encoding="ascii").strip()
    return ""
