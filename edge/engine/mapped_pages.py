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
    """The mappings of one file that somebody makes in this process between two moments, and keeps.

    Letting go of pages that have meanwhile become somebody else's would destroy that one's memory. So only what was not
    there before counts, and :meth:`drop` must not be called once the mappings may be gone.

    Args:
        path: the file; what is mapped of it now is left alone for ever.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = [(start, end) for start, end, _ in _mappings(path)]
        self._ranges: list[tuple[int, int]] = []

    def note(self) -> None:
        """Take the mappings that came since, but for those that somebody wrote into: that would be lost."""
        self._ranges = [
            (start, end)
            for start, end, is_written in _mappings(self._path)
            if not is_written and all(end <= low or high <= start for low, high in self._before)
        ]

    def drop(self) -> None:
        """Let the pages go; whoever reads them next gets them from the system's cache."""
        for start, end in self._ranges:
            _libc.madvise(start, end - start, _MADV_DONTNEED)


def _mappings(path: Path) -> Iterator[tuple[int, int, bool]]:
    """Start and end of the file's mappings, and whether somebody wrote into them; none where it cannot be known."""
    if not sys.platform.startswith("linux"):
        return
    name, bounds = os.fspath(path.resolve()), (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            start, end = key.split("-")
            bounds = (int(start, 16), int(end, 16)) if line.endswith(" " + name) else (0, 0)
        elif key == "Anonymous:" and bounds[1]:
            yield (*bounds, rest.split()[0] != "0")
