"""The files of a bundle: opened without following links, hashed, or read whole where they are small."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from edge.bundle.manifest import FileEntry
from edge.errors import BundleError

Progress = Callable[[int], None]
"""Called with the number of bytes handled since the last call."""

_CHUNK = 16 << 20
"""Bytes hashed at a time: a thread that hashes while another one imports waits milliseconds for Python after each."""


def hash_file(path: Path, *, progress: Progress | None = None) -> FileEntry:
    """Size and SHA-256 of a regular file, without following links.

    Raises:
        OSError: the file cannot be opened.
        BundleError: it is a link, a hard link, or no regular file.
    """
    with open_regular(path) as file:
        digest, size = hashlib.sha256(), 0
        chunk = memoryview(bytearray(min(_CHUNK, os.fstat(file.fileno()).st_size + 1)))
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            size += count
            if progress is not None:
                progress(count)
    return FileEntry(path=path.name, size=size, sha256=digest.hexdigest())


def open_regular(path: Path) -> FileIO:
    """Open a plain file for reading, unbuffered, without following links.

    Its only other names may be those in the bundles beside its own: an installed bundle shares with them what they have
    in common (docs/model-store.md).

    Raises:
        OSError: it cannot be opened.
        BundleError: it is a link, has a name elsewhere, or is no regular file.
    """
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or (info.st_nlink != 1 and info.st_nlink != _names_beside(path, info)):
        os.close(descriptor)
        raise BundleError(
            f"{path} is not a plain file", hint="bundles hold regular files without hard or symbolic links"
        )
    return os.fdopen(descriptor, "rb", buffering=0)


def read_small(path: Path, most: int) -> bytes | None:
    """A whole file of at most ``most`` bytes; None where there is none.

    Raises:
        BundleError: it is larger, no plain file, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            data = b"".join(iter(lambda: file.read(most + 1 - file.tell()), b""))
    except FileNotFoundError:
        return None
    except OSError as error:
        hint = "export or copy the bundle again"
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    if len(data) > most:
        raise BundleError(f"{path} is larger than {most} bytes", hint="this is not a qwedge bundle")
    return data


def _names_beside(path: Path, info: os.stat_result) -> int:
    """How many bundles, this one and those beside it, have this file under this name."""
    count = 0
    for other in path.absolute().parent.parent.glob(f"*/{glob.escape(path.name)}"):
        with suppress(FileNotFoundError):  # a bundle that is being removed
            count += os.path.samestat(other.lstat(), info)
    return count
