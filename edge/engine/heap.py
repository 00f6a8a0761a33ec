"""Steer the C library's heap: onnxruntime and the tokenizer take their memory from it, not from Python.

Only glibc can be steered; elsewhere nothing here has an effect, which costs speed and memory but no function.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HUGE_PAGE = 2 << 20
"""Bytes; x86-64 and ARM64 with 4 KiB pages."""
MMAP_THRESHOLD = 32 << 20
"""Bytes from which a block gets a mapping of its own: the most that glibc takes, and where its own adaption would end.
Below, a step's scratch memory stays in the heap instead of being mapped, cleared and unmapped in every step."""

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER, _DEFAULT_MMAP_MAX = 2**31 - 1, 65536
_MADV_HUGEPAGE = 14
_SMALL_PAGE = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_CAN_STEER = hasattr(_libc, "mallopt") and hasattr(_libc, "malloc_trim")
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def trim_heap() -> None:
    """Hand the heap's free pages back to the system."""
    if _CAN_STEER:
        _libc.malloc_trim(0)


@contextmanager
def huge_heap(size: int) -> Iterator[bool]:
    """Take what this thread allocates in this block from one stretch of huge pages, where the system has them.

    The stretch is the next part of the heap: it is asked for, marked and given back, so that malloc hands it out again
    piece by piece. Its pages take no memory before they are used. Huge from the first touch, they need neither a fault
    for every 4 KiB nor to be joined afterwards (:func:`edge.engine.huge_pages.collapse_resident`).

    Args:
        size: bytes that will be needed at most; more is no error, but in small pages again.

    Gives whether there is such a stretch. There is none outside the main thread, whose heap alone can be steered.
    """
    if not _CAN_STEER or threading.current_thread() is not threading.main_thread():
        yield False
        return
    _libc.mallopt(_MMAP_MAX, 0)
    _libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield _mark_next(size)
    finally:
        _libc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        _libc.mallopt(_MMAP_THRESHOLD, MMAP_THRESHOLD)
        _libc.mallopt(_TRIM_THRESHOLD, 2 * MMAP_THRESHOLD)


def _mark_next(size: int) -> bool:
    """Mark the part of the heap that comes next; false where memory is short or the system has no huge pages."""
    block = _libc.malloc(size) if mmap.PAGESIZE == _SMALL_PAGE else None
    if block is None:
        return False
    first, last = -(-block // HUGE_PAGE) * HUGE_PAGE, (block + size) // HUGE_PAGE * HUGE_PAGE
    status: int = _libc.madvise(first, max(0, last - first), _MADV_HUGEPAGE)
    _libc.free(block)
    return status == 0
