"""Files for this user alone (0600) that are replaced as a whole and survive a power cut."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from edge.durable import fsync_path
from edge.errors import ConfigError
from edge.settings.secret_files import is_credential

MAX_BYTES: Final = 1 << 20
_OTHERS: Final = 0o077


def read_private(path: Path) -> bytes:
    """Read a file that nobody else may read or write.

    Raises:
        ConfigError: it is open to others, no regular file, or too large.
        OSError: it cannot be read.
    """
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_BYTES:
            raise ConfigError(f"{path} is not the file that it should be", hint="name a regular file")
        if info.st_mode & _OTHERS and not is_credential(path):
            raise ConfigError(f"{path} is open to other users", hint=f"chmod 600 {path}")
        return file.read()


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Put a file in place, the whole of it or nothing.

    Raises:
        OSError: the disk refused.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already if all went well
    fsync_path(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder for this user alone, where it is missing.

    Raises:
        OSError: the disk refused.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explain what the disk refuses in the block.

    Raises:
        ConfigError: the disk refused.
    """
    try:
        yield
    except OSError as error:
        hint = "check the disk, and use the user that qwedge runs as"
        raise ConfigError(f"{path} cannot be read or written: {error.strerror}", hint=hint) from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing a file in the block; they wait.

    Raises:
        OSError: the disk refused.
    """
    make_folder(path.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path.with_name(f"{path.name}.lock"), flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
