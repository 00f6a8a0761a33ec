"""Where a bundle to be installed lies: a folder, or a tar file as it comes on a stick."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from edge.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    FileEntry,
    read_manifest_bytes,
    read_signature,
)
from edge.errors import BundleError, StoreError
from edge.store.tar import Member, TarError, read_members

TAR_SUFFIX = ".tar"


@dataclass(frozen=True)
class Source:
    """A bundle that nobody has checked yet; made by :func:`open_source`."""

    path: Path
    """The folder, or the tar file."""
    manifest: bytes
    """``manifest.json``."""
    signature: bytes | None
    """``manifest.sig``, where there is one."""
    members: Mapping[str, Member] | None
    """Where the files are in the tar file; None for a folder."""

    def open(self, entry: FileEntry) -> tuple[FileIO, int]:
        """Open a file of the bundle.

        Returns:
            What to read from, and where the file begins in it.

        Raises:
            BundleError: it is not there, no plain file, or of another size than the manifest says.
            OSError: it cannot be read.
        """
        try:
            file, start, size = self._locate(entry.path)
        except (FileNotFoundError, KeyError):
            hint = "copy the bundle again"
            raise BundleError(f"{self.path} lacks the file {entry.path}", hint=hint) from None
        if size != entry.size:
            file.close()
            message = f"{entry.path} of {self.path} has {size} bytes, the manifest says {entry.size}"
            raise BundleError(message, hint="copy the bundle again")
        return file, start

    def read(self, file: FileIO, position: int, count: int) -> bytes:
        """Up to ``count`` bytes of what :meth:`open` opened, at least one.

        Raises:
            BundleError: the stick was pulled out, or the file became shorter.
        """
        try:
            data, reason = os.pread(file.fileno(), count, position), "it became shorter"
        except OSError as error:
            data, reason = b"", error.strerror or str(error)
        if not data:
            raise BundleError(f"{self.path} cannot be read: {reason}", hint="install it again: the copy goes on")
        return data

    def _locate(self, name: str) -> tuple[FileIO, int, int]:
        """Open a file; gives where it begins and its size besides."""
        if self.members is not None:
            member = self.members[name]
            return _open(self.path), member.start, member.size
        file = _open(self.path / name)
        return file, 0, os.fstat(file.fileno()).st_size


def open_source(path: Path) -> Source:
    """Read manifest and signature of a bundle's folder or tar file; nothing is checked yet.

    Raises:
        BundleError: there is no bundle.
    """
    if path.is_file():
        return _open_tar(path)
    return Source(path, read_manifest_bytes(path), read_signature(path), None)


def find_sources(path: Path) -> tuple[Path, ...]:
    """The bundles at a place: itself, or the folders with a manifest and the tar files in it, as on a stick.

    Raises:
        StoreError: the folder cannot be read.
    """
    if not path.is_dir() or (path / MANIFEST).exists():
        return (path,)
    try:
        return tuple(each for each in sorted(path.iterdir()) if _looks_like_bundle(each))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}", hint="is the stick mounted?") from None


def _looks_like_bundle(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return path.suffix == TAR_SUFFIX if path.is_file() else (path / MANIFEST).is_file()


def _open_tar(path: Path) -> Source:
    hint = "make one with: tar -cf FILE.tar -C BUNDLE ."
    try:
        with _open(path) as file:
            members = read_members(file)
            manifest = _read(file, members.get(MANIFEST), MAX_MANIFEST_BYTES)
            signature = _read(file, members.get(SIGNATURE), MAX_SIGNATURE_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BundleError(f"{path} is no tar file of a bundle: {reason}", hint=hint) from None
    if manifest is None:
        raise BundleError(f"{path} is no tar file of a bundle: it has no {MANIFEST}", hint=hint)
    return Source(path, manifest, signature, members)


def _read(file: FileIO, member: Member | None, most: int) -> bytes | None:
    """A small file; None where there is none."""
    if member is None:
        return None
    if member.size > most:
        raise TarError(f"{member.path!r} is larger than {most} bytes")
    return os.pread(file.fileno(), member.size, member.start)


def _open(path: Path) -> FileIO:
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
