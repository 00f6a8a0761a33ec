"""Memory: how much, how fast, and what it spills into."""

from __future__ import annotations

import threading
import time
from typing import Final

import numpy as np
import psutil
from numpy.typing import NDArray

from edge.doctor.check import GIB, MIB, Check, gib
from edge.machine import Host, usable_threads
from edge.planning.available import read_available

MIN_FREE_RAM: Final = GIB
"""Bytes; the 0.5B model in 4 bits needs about 700 MB."""
MEASURE_S: Final = 0.8
_BLOCK: Final = 16 * MIB
MAX_MEASURED: Final = 512 * MIB
"""Bytes that are read over and over: more than any cache of a device."""


def examine_memory(host: Host, *, measure: bool, need: int | None) -> list[Check]:
    """What there is to say about memory.

    Args:
        host: the machine.
        measure: whether to measure how fast it is, which takes a second.
        need: bytes that the configured bundle takes for one conversation; None where that is not known.
    """
    return [_room(host, need), _swap(host), *([_bandwidth()] if measure else [])]


def _room(host: Host, need: int | None) -> Check:
    found = read_available(host.root / "proc", host.root / "sys/fs/cgroup")
    if found is None:
        return Check("memory", "ok", "what is left cannot be told here")
    detail = f"{found.limit} {gib(found.hard)} left, of {gib(psutil.virtual_memory().total)}"
    if need is not None and found.hard < need:
        hint = "stop other programs (a qwedge that serves already?), lower engine.context, or see qwedge plan"
        return Check("memory", "warn", f"{detail}; the bundle needs {gib(need)} for a conversation", hint)
    if found.hard < MIN_FREE_RAM:
        return Check("memory", "warn", detail, "stop other programs, or lower engine.slots and engine.context")
    return Check(
        "memory", "ok", detail if need is None else f"{detail}; the bundle needs {gib(need)} for a conversation"
    )


def _swap(host: Host) -> Check:
    areas = [line.split() for line in host.text("proc/swaps").splitlines()[1:]]
    sizes = {fields[0]: int(fields[2]) << 10 for fields in areas if len(fields) >= 3 and fields[2].isdigit()}
    if not sizes:
        return Check("swap", "ok", "none: what does not fit ends at once, instead of becoming slow")
    detail = ", ".join(f"{gib(size)} {'zram' if 'zram' in name else 'on a disk'}" for name, size in sizes.items())
    if all("zram" in name for name in sizes):
        return Check("swap", "ok", detail)
    hint = "weights that are swapped out make each token take seconds, and cards wear out: swapoff, or zram alone"
    return Check("swap", "warn", detail, hint)


def _bandwidth() -> Check:
    threads = _physical()
    speed = read_speed(threads, MEASURE_S, MAX_MEASURED)
    detail = f"{speed / 1e9:.1f} GB/s read by {threads} threads; each token reads all weights once"
    return Check("bandwidth", "ok", detail)


def _physical() -> int:
    return max(1, min(usable_threads(), psutil.cpu_count(logical=False) or usable_threads()))


def read_speed(threads: int, seconds: float, most: int) -> float:
    """Bytes of memory that threads read in a second, as matrices of weights are read: in order, once.

    What else runs on the machine takes part of it: an idle one gives its real figure.

    Args:
        threads: of which each reads memory of its own.
        seconds: how long to read.
        most: bytes that are read over and over; a quarter of what is free is not exceeded.
    """
    count = max(1, min(most, psutil.virtual_memory().available // 4) // (_BLOCK * threads))
    memory = [[np.ones(_BLOCK // 4, np.float32) for _ in range(count)] for _ in range(threads)]
    passed = [0] * threads
    begun = time.monotonic()

    def read(index: int, blocks: list[NDArray[np.float32]]) -> None:
        while True:
            for block in blocks:
                block.sum()  # vectorized, and faster than memory on every core that we know; leaves Python to others
                passed[index] += block.nbytes
                if time.monotonic() - begun >= seconds:
                    return

    readers = [threading.Thread(target=read, args=(index, blocks)) for index, blocks in enumerate(memory)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return sum(passed) / (time.monotonic() - begun)
