"""Put the packed weights on huge pages.

A decode step streams all weights through the processor once, and with 4 KiB pages much of that time goes into address
translation. onnxruntime takes its memory from malloc, whose pages are small unless the system's transparent huge pages
are ``always``. Linux 6.1 can join pages that are there already (``MADV_COLLAPSE``): decode gained 15% on the machine of
docs/lab-notes.md. Only blocks that are resident to the last page are joined, so that nothing takes more memory.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge.engine.heap import HUGE_PAGE

log = logging.getLogger(__name__)

_MADV_COLLAPSE = 25
_GIVE_UP_AFTER = 16
_PAGES = HUGE_PAGE // 4096
_PRESENT = np.uint64(63)
"""Bit of a page in /proc/self/pagemap: it is in memory."""


def collapse_resident() -> int:
    """Join this process's anonymous memory into huge pages where a whole one is resident.

    Returns:
        Bytes joined; 0 where the system cannot do it, which costs speed and nothing else.
    """
    if not sys.platform.startswith("linux") or mmap.PAGESIZE != HUGE_PAGE // _PAGES:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    joined = failed = 0
    try:
        for start in _resident_blocks():
            if libc.madvise(start, HUGE_PAGE, _MADV_COLLAPSE) == 0:
                joined += 1
            else:
                failed += 1
            if failed >= _GIVE_UP_AFTER and joined == 0:
                break  # an old kernel, or huge pages are off: every other block would fail too
    except OSError as error:
        log.debug("no huge pages: %s", error)
    return joined * HUGE_PAGE


def _resident_blocks() -> Iterator[int]:
    """Addresses of the huge-page-sized blocks of private memory whose every page is resident."""
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        for start, end in _private_regions():
            first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
            if first >= last:
                continue
            pagemap.seek(first // mmap.PAGESIZE * 8)
            entries = np.frombuffer(pagemap.read((last - first) // mmap.PAGESIZE * 8), np.uint64)
            resident = (entries >> _PRESENT).reshape(-1, _PAGES).sum(axis=1) == _PAGES
            yield from (first + int(block) * HUGE_PAGE for block in np.flatnonzero(resident))


def _private_regions() -> list[tuple[int, int]]:
    """Start and end of the writable private mappings without a file behind them."""
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if fields[1] == "rw-p" and (len(fields) == 5 or fields[5] == "[heap]"):
            start, end = fields[0].split("-")
            regions.append((int(start, 16), int(end, 16)))
    return regions
