"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass
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
