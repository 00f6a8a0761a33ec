"""Tar files from elsewhere: which plain files are in them and where, found without unpacking anything.

Only headers are read, one block at a time, so that neither a lying size nor an endless header takes memory. What is not
a plain file in one folder is refused: links, devices, absolute names, names with ``..``, names that come twice. The
format is POSIX's ustar and pax (IEEE Std 1003.1, pax), as tar, Python and others write it.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO

BLOCK = 512
MAX_MEMBERS = 256
MAX_EXTENDED_BYTES = 1 << 16
"""Bytes of a pax header."""
_PLAIN = {tarfile.REGTYPE, tarfile.AREGTYPE}


class TarError(ValueError):
    """The file is no tar file, or holds what no bundle has."""


@dataclass(frozen=True)
class Member:
    """A plain file in a tar file."""

    path: str
    """As it stands there."""
    start: int
    """Where its bytes begin."""
    size: int


def read_members(file: FileIO) -> dict[str, Member]:
    """The plain files by name, which may all be in one folder.

    Raises:
        TarError: see the class.
        OSError: the file cannot be read.
    """
    found: dict[str, Member] = {}
    folders = set()
    for member in _members(file):
        *parents, name = [part for part in member.path.split("/") if part != "."]
        folders.add("/".join(parents))
        if member.path.startswith("/") or ".." in parents or name in {"", ".."} or len(folders) > 1 or len(parents) > 1:
            raise TarError(f"{member.path!r} is not in the bundle's one folder")
        if name in found:
            raise TarError(f"{name!r} is there twice")
        found[name] = member
    return found


def _members(file: FileIO) -> Iterator[Member]:
    """The plain files in their order."""
    end = os.fstat(file.fileno()).st_size
    position, extended, count = 0, dict[str, str](), 0
    while (header := _header(file, position)) is not None:
        count += 1
        start = position + BLOCK
        size = int(extended.get("size", header.size))
        if count > 2 * MAX_MEMBERS or size < 0 or start + size > end:
            raise TarError("it is cut off" if size >= 0 else "a size is negative")
        if header.type == tarfile.XHDTYPE:
            extended = _extended(file, start, size)
        elif header.type in _PLAIN:
            yield Member(extended.get("path", header.name), start, size)
            extended = {}
        elif header.type == tarfile.DIRTYPE:
            extended = {}
        elif header.type != tarfile.XGLTYPE:
            raise TarError(f"{header.name!r} is no plain file")
        position = start + -(-size // BLOCK) * BLOCK


def _header(file: FileIO, position: int) -> tarfile.TarInfo | None:
    """The header at a position; None where the archive ends."""
    block = os.pread(file.fileno(), BLOCK, position)
    if not block.strip(b"\0"):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise TarError("it is no tar file, or damaged") from None


def _extended(file: FileIO, start: int, size: int) -> dict[str, str]:
    """The records of a pax header: ``LENGTH KEY=VALUE`` and a line feed each."""
    if size > MAX_EXTENDED_BYTES:
        raise TarError("a header is too long")
    data, records = os.pread(file.fileno(), size, start), dict[str, str]()
    while data:
        length, space, _ = data.partition(b" ")
        record = data[len(length) + 1 : int(length)] if space and length.isdigit() else b""
        key, equals, value = record.removesuffix(b"\n").decode("utf-8", "surrogateescape").partition("=")
        if not equals or key.startswith("GNU.sparse"):
            raise TarError("a header is malformed, or of a sparse file")
        records[key] = value
        data = data[int(length) :]
    return records
