"""Give memory that was freed back to the system."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Hand the free pages of malloc's heap back; nothing where the C library has no ``malloc_trim``."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
