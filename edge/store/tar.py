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
MAX_HEADERS = 512
MAX_EXTENDED_BYTES = 1 << 16
"""Bytes of a pax header."""
_PLAIN = {tarfile.REGTYPE, tarfile.AREGTYPE}
_NO_FILES = {tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE}
"""Folders, and pax headers: for the next entry, and for all."""


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
        folder, _, name = member.path.removeprefix("./").rpartition("/")
        folders.add(folder)
        if name in {"", "..", "."} or folder in {".", ".."} or "/" in member.path[:1] + folder or len(folders) > 1:
            raise TarError(f"{member.path!r} is not in the bundle's one folder")
        if name in found:
            raise TarError(f"{name!r} is there twice")
        found[name] = member
    return found


def _members(file: FileIO) -> Iterator[Member]:
    """The plain files in their order."""
    end = os.fstat(file.fileno()).st_size
    position, extended = 0, dict[str, str]()
    for _ in range(MAX_HEADERS):
        header = _header(file, position)
        if header is None:
            return
        start, size = position + BLOCK, int(extended.get("size", header.size))
        if not 0 <= size <= end - start:
            raise TarError("it is cut off")
        if header.type in _PLAIN:
            yield Member(extended.get("path", header.name), start, size)
        elif header.type not in _NO_FILES:
            raise TarError(f"{header.name!r} is no plain file")
        extended = _extended(file, start, size) if header.type == tarfile.XHDTYPE else {}
        position = start + -(-size // BLOCK) * BLOCK
    raise TarError("it holds more files than any bundle")


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
