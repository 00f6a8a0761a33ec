"""What is read from the kernel: who used the processors, and how much memory a process has."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

MOST_OTHERS = 0.1
"""Share of the machine that others may take in a run that counts."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LOOK_S = 1.0
_LOOK_AGAIN_S = 0.2
_SHORTEST_S = 0.1
"""The kernel counts in ticks of 10 ms: less time says nothing."""


class Meter:
    """CPU time of everybody but us and our children, since it was made."""

    def __init__(self) -> None:
        self._wall, self._busy, self._ours = _clocks()

    def others(self) -> float:
        """The share of the machine's cores that other processes took."""
        wall, busy, ours = _clocks()
        if wall - self._wall < _SHORTEST_S:
            return 0.0
        foreign = (busy - self._busy) - (ours - self._ours)
        return max(0.0, foreign / ((wall - self._wall) * (os.cpu_count() or 1)))


def await_quiet(patience_s: float) -> None:
    """Wait until others leave the machine alone, but no longer than that."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        meter = Meter()
        time.sleep(_LOOK_S)
        if meter.others() <= MOST_OTHERS:
            return


def memory_mb(pid: int) -> dict[str, float]:
    """Memory of a process in MB (10^6 bytes): the peak of what was resident, and what of it no file backs now."""
    names = {"VmHWM:": "peak", "RssAnon:": "anonymous"}
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines())
    return {names[key]: int(rest[0]) * 1024 / 1e6 for key, *rest in lines if key in names}


class ProportionalMemory:
    """Looks at what a process takes while the block runs, a page that it maps several times counted once.

    The kernel's RSS counts such a page each time. MB are 10^6 bytes.
    """

    def __init__(self, pid: int) -> None:
        self.peak_mb = 0.0
        self._path = Path(f"/proc/{pid}/smaps_rollup")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_AGAIN_S):
            lines = (line.split() for line in self._path.read_text("ascii").splitlines())
            found = next(int(kilobytes) for name, kilobytes, *_ in lines if name == "Pss:")
            self.peak_mb = max(self.peak_mb, found * 1024 / 1e6)


def warm_page_cache(path: Path) -> None:
    """Read a file, or every file of a folder, so that a start afterwards finds it in memory."""
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def _clocks() -> tuple[float, float, float]:
    """Wall time, the machine's busy time, and the part of it that is ours, in seconds."""
    me = psutil.Process()
    # What a child used moves to our `children_*` when it has ended.
    ours = sum(me.cpu_times()[:4])
    for child in me.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            ours += sum(child.cpu_times()[:4])
    return time.perf_counter(), _machine_busy_s(), ours


def _machine_busy_s() -> float:
    """CPU seconds of all processes since boot, stolen time included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
        int(field) for field in Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S
