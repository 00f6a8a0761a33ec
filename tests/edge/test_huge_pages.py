"""Huge pages for the weights: memory keeps its contents and takes no more room."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import psutil
import pytest

from edge.engine import huge_pages
from edge.engine.heap import HUGE_PAGE
from edge.engine.huge_pages import collapse_resident


def huge_kib(address: int) -> int:
    """Huge pages of the mapping that holds ``address``, in KiB."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


def test_resident_memory_is_joined_and_untouched_memory_is_left_alone() -> None:
    full = mmap.mmap(-1, 16 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    sparse = mmap.mmap(-1, 16 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = np.frombuffer(full, np.uint8)
    values[:] = np.arange(len(values), dtype=np.uint8)
    sparse[:: mmap.PAGESIZE * 2] = b"x" * (len(sparse) // mmap.PAGESIZE // 2)
    before = psutil.Process().memory_info().rss
    if collapse_resident() == 0:
        pytest.skip("this system cannot join pages")
    assert huge_kib(values.ctypes.data + 8 * HUGE_PAGE) >= 8 * HUGE_PAGE // 1024
    # Half of what is sparse would be 16 MiB; other threads of the tests take some meanwhile.
    assert psutil.Process().memory_info().rss - before < 8 << 20
    np.testing.assert_array_equal(values, np.arange(len(values), dtype=np.uint8))
    assert sparse[: mmap.PAGESIZE * 2 : mmap.PAGESIZE * 2] == b"x"


def test_a_system_without_the_call_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_MADV_COLLAPSE", 9999)
    assert collapse_resident() == 0
