"""A folder of this user alone (0700), in use by one process at a time, whose files (0600) appear whole or not at all.

Every name is resolved against the open folder and never through a link, so nobody can have a file of theirs read,
overwritten or removed by planting a link in it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from edge.errors import ConfigError, UnavailableError

LOCK = "lock"
_TEMPORARY = ".tmp"
_SECRET_BYTES = 32
_OTHERS = 0o077
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC


class NotPlainError(Exception):
    """A name in the folder is a link, no regular file, or a file that others may touch."""


class PrivateFolder:
    """An open, locked folder; made by :meth:`open`."""

    def __init__(self, path: Path, descriptor: int, lock: int, *, read_only: bool) -> None:
        self.path = path
        self.read_only = read_only
        """Whether the file system was read-only when the folder was opened."""
        self._descriptor = descriptor
        self._lock = lock

    @classmethod
    def open(cls, path: Path) -> PrivateFolder:
        """Create the folder where it is missing, check it, lock it, and remove what an interrupted write left.

        Raises:
            ConfigError: it belongs to another user, or others may look into it.
            UnavailableError: another process uses it.
            OSError: it cannot be had for another reason.
        """
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _check_owner(path, descriptor)
            lock, read_only = _take_lock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        folder = cls(path, descriptor, lock, read_only=read_only)
        for name in folder.names(_TEMPORARY):
            folder.remove(name)
        return folder

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._lock)
        os.close(self._descriptor)

    def names(self, suffix: str) -> list[str]:
        """The names that end so, in alphabetical order."""
        names = os.listdir(self._descriptor)  # noqa: PTH208 - pathlib knows no descriptors
        return sorted(name for name in names if name.endswith(suffix))

    def read(self, name: str) -> BinaryIO:
        """Open a file.

        Raises:
            NotPlainError: it is a link, has hard links, is no regular file, or others may read or write it.
            OSError: it cannot be opened.
        """
        try:
            # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
            file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _SAFE, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENXIO}:
                raise NotPlainError from None
            raise
        info = os.fstat(file)
        plain = stat.S_ISREG(info.st_mode) and info.st_nlink == 1
        if not plain or info.st_uid != os.geteuid() or info.st_mode & _OTHERS:
            os.close(file)
            raise NotPlainError
        return os.fdopen(file, "rb", buffering=0)

    def write(self, name: str, fill: Callable[[BinaryIO], None]) -> None:
        """Write a file that survives a power cut: under its name there is the whole of it or what was there before.

        Raises:
            OSError: the disk refused.
        """
        temporary = name + _TEMPORARY
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE
        try:
            with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=self._descriptor), "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        finally:
            self.remove(temporary)  # gone already if all went well
        os.fsync(self._descriptor)

    def secret(self, name: str) -> bytes:
        """The 32 random bytes in a file, made on first use and wherever the file is not what it should be.

        Raises:
            OSError: they can neither be read nor written.
        """
        with suppress(FileNotFoundError, NotPlainError), self.read(name) as file:
            secret = file.read(_SECRET_BYTES + 1)
            if len(secret) == _SECRET_BYTES:
                return secret
        secret = os.urandom(_SECRET_BYTES)
        self.write(name, lambda file: _fill(file, secret))
        return secret

    def remove(self, name: str) -> None:
        """Remove a file or a link if that is possible."""
        with suppress(OSError):
            os.unlink(name, dir_fd=self._descriptor)

    def touch(self, name: str, time_ns: int) -> None:
        """Set a file's time of last use if that is possible."""
        with suppress(OSError):
            os.utime(name, ns=(time_ns, time_ns), dir_fd=self._descriptor, follow_symlinks=False)


def _fill(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _check_owner(path: Path, descriptor: int) -> None:
    info = os.fstat(descriptor)
    if info.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to another user", hint="name a folder of the user that qwedge runs as")
    if info.st_mode & _OTHERS:
        raise ConfigError(f"{path} is open to other users", hint=f"chmod 700 {path}, or name a folder of its own")


def _take_lock(path: Path, folder: int) -> tuple[int, bool]:
    """The locked descriptor, and whether the file system is read-only."""
    read_only = False
    try:
        lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | _SAFE, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        read_only = True
        lock = os.open(LOCK, os.O_RDONLY | _SAFE, dir_fd=folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise UnavailableError(f"another process uses {path}", hint="give each its own folder") from None
    return lock, read_only
