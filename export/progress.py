"""Progress of long steps, reported to whoever draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Draws one step at a time: ``start``, any number of ``advance``, ``finish`` (also when the step failed).

    ``advance`` may come from another thread, but never from two at once.
    """

    def start(self, label: str, total_bytes: int | None) -> None:
        """A step begins; None means that nobody knows how long it is."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""

    def finish(self) -> None:
        """The step is over."""


class Silent:
    """Draws nothing."""

    def start(self, label: str, total_bytes: int | None) -> None:
        """Ignore it."""

    def advance(self, num_bytes: int) -> None:
        """Ignore it."""

    def finish(self) -> None:
        """Ignore it."""


@contextmanager
def step(progress: Progress, label: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """Run one step and yield its ``advance``."""
    progress.start(label, total_bytes)
    try:
        yield progress.advance
    finally:
        progress.finish()
