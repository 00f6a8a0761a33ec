"""The C library's heap: huge pages from the first touch, and no memory before it."""

from __future__ import annotations

import ctypes
import mmap
import re
import threading
from pathlib import Path

import numpy as np
import psutil

from edge.engine.heap import HUGE_PAGE, huge_heap, trim_heap

MiB = 1 << 20
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def rss() -> int:
    size: int = psutil.Process().memory_info().rss
    return size


def thp_is_on() -> bool:
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return mode.exists() and "[never]" not in mode.read_text() and mmap.PAGESIZE == 4096


def huge_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"AnonHugePages:\s+(\d+) kB", text)
    assert found
    return int(found[1]) * 1024


def allocate(size: int) -> int:
    """A block of the C library's heap, every byte of it written."""
    block: int = libc.malloc(size)
    ctypes.memset(block, 7, size)
    return block


def test_blocks_of_many_sizes_lie_on_huge_pages_and_unused_room_takes_no_memory() -> None:
    trim_heap()
    before, huge_before = rss(), huge_bytes()
    sizes = [3 * MiB + 64, 5 * MiB, 700_000, 40 * MiB]
    with huge_heap(256 * MiB) as huge:
        blocks = [allocate(size) for size in sizes]
        grown, grown_huge = rss() - before, huge_bytes() - huge_before
    assert grown < sum(sizes) + 2 * HUGE_PAGE + 4 * MiB
    if huge and thp_is_on():
        assert grown_huge > sum(sizes) * 3 // 4
    for block in blocks:
        libc.free(block)
    trim_heap()
    assert rss() - before < 8 * MiB


def test_memory_of_later_arrays_is_untouched_until_it_is_written() -> None:
    with huge_heap(64 * MiB):
        pass
    before = rss()
    array = np.zeros(128 * MiB, np.uint8)
    assert rss() - before < 8 * MiB
    assert not array[:: 4 * MiB].any()


def test_another_thread_has_no_such_heap_and_can_allocate_all_the_same() -> None:
    given: list[bool] = []

    def work() -> None:
        with huge_heap(64 * MiB) as huge:
            given.append(huge)
            libc.free(allocate(8 * MiB))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert given == [False]
