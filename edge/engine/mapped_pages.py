"""Let go of the pages of mapped files that nobody needs at the moment.

onnxruntime maps the file of the weights. What it packs it reads once, what it looks up (rows of the embedding) it
reads here and there, and Linux maps 15 neighbours with each page: tens of MB count as memory of this process for
nothing. They are the system's copy of the file and stay in its cache; a page that is needed again costs a microsecond.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_MADV_DONTNEED = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedPages:
    """The mappings of one file in this process, as they are now and as long as they stay.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._ranges = list(_unchanged(path)) if sys.platform.startswith("linux") else []

    def drop(self) -> None:
        """Let the pages go; whoever reads them next gets them from the system's cache."""
        for start, end in self._ranges:
            _libc.madvise(start, end - start, _MADV_DONTNEED)


def _unchanged(path: Path) -> Iterator[tuple[int, int]]:
    """Start and end of the file's mappings into which nobody wrote: what was written would be lost."""
    name, bounds = os.fspath(path.resolve()), (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            start, end = key.split("-")
            bounds = (int(start, 16), int(end, 16)) if line.endswith(" " + name) else (0, 0)
        elif key == "Anonymous:" and bounds[1] and rest.split()[0] == "0":
            yield bounds
