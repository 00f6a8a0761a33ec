"""Progress on the terminal: bars where somebody watches, one line per step where the output goes to a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from export.progress import Progress


@contextmanager
def console_progress() -> Iterator[Progress]:
    """Draw progress on stderr."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def start(self, label: str, total_bytes: int | None) -> None:
        self._task = self._bars.add_task(label, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, num_bytes)

    def finish(self) -> None:
        """Complete a step of unknown length, and leave a failed one where it stopped."""
        if self._task is None:
            return
        task = self._bars.tasks[self._bars.task_ids.index(self._task)]
        if task.total is None:
            self._bars.update(self._task, total=1, completed=1)
        self._bars.stop_task(self._task)
        self._task = None


class _Lines:
    def start(self, label: str, total_bytes: int | None) -> None:
        size = "" if total_bytes is None else f" ({total_bytes:,})"
        print(f"{label}{size} ...", file=sys.stderr, flush=True)

    def advance(self, num_bytes: int) -> None:
        pass

    def finish(self) -> None:
        pass
