"""The store's folder: who may use it, one at a time, and what a disk that refuses is called."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.durable import fsync_path
from edge.errors import ConfigError, StoreError

_WRITABLE_BY_OTHERS = 0o022


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Translate what a disk refuses into an error with a hint.

    Raises:
        StoreError: the disk refused.
    """
    try:
        yield
    except OSError as error:
        hint = "qwedge gc makes room" if error.errno == errno.ENOSPC else "check the disk and who may write to it"
        reason = error.strerror or str(error)
        raise StoreError(f"the model store {folder} cannot be used: {reason}", hint=hint) from None


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file until the block ends; gives False where another process holds it and this one is not to wait.

    Raises:
        OSError: it cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    finally:
        os.close(descriptor)


def flock(descriptor: int, how: int) -> bool:
    """Whether the lock could be taken.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return True


def make_folder(folder: Path) -> None:
    """Make the store's folder where it is missing, and refuse one that another user could change.

    Raises:
        ConfigError: it belongs to another user, or others may write to it.
        OSError: it cannot be made.
    """
    if not folder.exists():
        folder.mkdir(parents=True)
        fsync_path(folder.parent)
    info = folder.stat()
    if info.st_uid != os.geteuid():
        hint = "run the command as the user that qwedge runs as"
        raise ConfigError(f"the model store {folder} belongs to another user", hint=hint)
    if info.st_mode & _WRITABLE_BY_OTHERS:
        raise ConfigError(f"others may write to the model store {folder}", hint=f"chmod 755 {folder}")


@contextmanager
def in_use(path: Path, *, alone: bool = False) -> Iterator[bool]:
    """Mark a file or folder as used until the block ends.

    Args:
        path: what is used.
        alone: by nobody else; the block gets False where somebody else does.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file or folder; from a power cut on, the folder is there as a whole, or hidden, or gone.

    Raises:
        OSError: the disk refused.
    """
    if not path.name.startswith("."):
        path = path.rename(path.with_name(f".{path.name}.removed"))
        fsync_path(path.parent)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
