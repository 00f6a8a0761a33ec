"""Writing so that a power cut leaves the old or the new, never half of it."""

from __future__ import annotations

import os
from pathlib import Path


def replace_durably(path: Path, data: bytes) -> None:
    """Write a file that survives a power cut: under its name there is the whole of it, or what was there before.

    Raises:
        OSError: the disk refused.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        fsync_path(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's names.

    Raises:
        OSError: the disk refused.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
