"""How much memory this process may still take: what the machine has, and what its control groups allow.

[1] https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
[2] https://docs.kernel.org/filesystems/proc.html#meminfo
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
"""Of ``memory.stat``: what the kernel frees before it ends a process."""


@dataclass(frozen=True)
class Available:
    """Memory that can be had, in bytes."""

    hard: int
    """Beyond this the kernel ends processes; swap counts."""
    soft: int
    """Beyond this the machine swaps, or the kernel slows the group down."""
    limit: str
    """What sets ``hard``, in words."""
    resident: int
    """Anonymous memory that this process has already."""


def read_available(proc: Path = PROC, cgroups: Path = CGROUPS) -> Available | None:
    """Look what this process can have now; None where the system does not tell.

    Args:
        proc: where Linux shows its processes.
        cgroups: where control groups of version 2 are mounted, or a folder ``unified`` with them.
    """
    machine = _table(proc / "meminfo")
    if "MemAvailable" not in machine:
        return None
    swap = machine.get("SwapFree", 0)
    rooms, softs = [(machine["MemAvailable"] + swap, "this machine has")], [machine["MemAvailable"]]
    for group in _groups(proc, cgroups):
        used = (_number(group / "memory.current") or 0) - _reclaimable(group)
        most, high = _number(group / "memory.max"), _number(group / "memory.high")
        if most is not None:
            rooms.append((most - used + _swap_room(group, swap), "its control group allows (memory.max)"))
        softs += [bound - used for bound in (most, high) if bound is not None]
    hard, limit = min(rooms)
    own = _table(proc / "self" / "status").get("RssAnon", 0)
    return Available(max(0, hard), max(0, min(softs)), limit, own)


def _groups(proc: Path, cgroups: Path) -> Iterator[Path]:
    """This process' control group and those it is in, as far as they can be seen."""
    with suppress(OSError):
        root = cgroups / "unified" if (cgroups / "unified").is_dir() else cgroups
        lines = (proc / "self" / "cgroup").read_text().splitlines()
        path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
        if path is not None:
            group = root / path
            yield group
            while group != root and root in group.parents:
                group = group.parent
                yield group


def _swap_room(group: Path, free: int) -> int:
    most = _number(group / "memory.swap.max")
    return free if most is None else max(0, min(free, most - (_number(group / "memory.swap.current") or 0)))


def _reclaimable(group: Path) -> int:
    with suppress(OSError, ValueError):
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return sum(int(count) for name, count in lines if name in _RECLAIMABLE)
    return 0


def _number(file: Path) -> int | None:
    """A limit in bytes; None where there is none."""
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def _table(file: Path) -> Mapping[str, int]:
    """Lines like ``MemAvailable:  123 kB``, in bytes."""
    found = {}
    with suppress(OSError):
        for line in file.read_text().splitlines():
            name, _, rest = line.partition(":")
            if rest.endswith(" kB"):
                found[name] = int(rest.removesuffix(" kB")) << 10
    return found
