"""What this machine is, from ``/proc`` and ``/sys``."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ISA_FEATURES: Final = {
    "x86_64": ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"),
    "aarch64": ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
}
"""Features of /proc/cpuinfo that the kernels of quantized models use, by machine."""


@dataclass(frozen=True)
class Host:
    """Where Linux tells of a machine; nothing that cannot be read is an error."""

    root: Path = Path("/")
    """Of ``proc`` and ``sys``."""
    machine: str = field(default_factory=platform.machine)
    """``x86_64``, ``aarch64``."""

    def text(self, path: str) -> str:
        """What a file says, without the white space around it; empty where it cannot be read."""
        with suppress(OSError):
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
        return ""

    def number(self, path: str) -> int | None:
        """The integer that a file says; None where it says none."""
        text = self.text(path)
        return int(text) if re.fullmatch(r"-?\d+", text) else None

    def names(self, pattern: str) -> Iterator[str]:
        """The files that a pattern finds, in order, as :meth:`text` takes them."""
        with suppress(OSError):
            yield from sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))


def cpu_model(host: Host | None = None) -> str:
    """The board's name where the kernel knows it (ARM), else the processor's."""
    host = host or Host()
    board = host.text("proc/device-tree/model")
    match = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", host.text("proc/cpuinfo"), re.MULTILINE)
    return board or (match.group(1).strip() if match else host.machine)


def isa_features(host: Host | None = None) -> tuple[str, ...]:
    """Those of :data:`ISA_FEATURES` that every core has."""
    host = host or Host()
    lists = re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", host.text("proc/cpuinfo"), re.MULTILINE)
    present = set.intersection(*(set(found.split()) for found in lists)) if lists else set()
    return tuple(name for name in ISA_FEATURES.get(host.machine, ()) if name in present)


def usable_threads() -> int:
    """Threads that the kernel lets this process run at once."""
    return len(os.sched_getaffinity(0))


def cgroups(host: Host) -> Iterator[str]:
    """The folders of this process's control group and of those around it, the innermost first (version 2) [1].

    [1] https://docs.kernel.org/admin-guide/cgroup-v2.html
    """
    match = re.search(r"^0::/(.*)$", host.text("proc/self/cgroup"), re.MULTILINE)
    parts = [part for part in match.group(1).split("/") if part not in {"", ".."}] if match else []
    for length in range(len(parts), -1, -1):
        yield "/".join(("sys/fs/cgroup", *parts[:length]))


def cpu_quota(host: Host) -> float | None:
    """Processors' worth of time that the control groups let this process have; None where they set no limit."""
    limits = [re.fullmatch(r"(\d+) (\d+)", host.text(f"{folder}/cpu.max")) for folder in cgroups(host)]
    return min((int(limit[1]) / int(limit[2]) for limit in limits if limit is not None), default=None)
