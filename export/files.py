"""Files of a checkpoint: bounded reads by offset, JSON and hashes, with errors that name the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
"""Larger than any tokenizer.json of the Qwen families (11-20 MB)."""
DAMAGED = "the file is damaged or was not downloaded completely: fetch it again"
"""Hint for every kind of broken file."""
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class WeightFile:
    """An open file read by offset.

    ``pread`` copies from the page cache; a memory map would keep every page it touched in this process's RSS.
    """

    path: Path
    descriptor: int
    size: int
    """Bytes when it was opened."""

    @classmethod
    def open(cls, path: Path) -> WeightFile:
        """Open a file for reading.

        Raises:
            CheckpointError: it is missing, no regular file or not readable.
        """
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or no file", hint="give the complete checkpoint")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error) from None
        return cls(path, descriptor, os.fstat(descriptor).st_size)

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """Bytes [offset, offset + num_bytes) as a uint8 array of its own.

        Raises:
            CheckpointError: the file ends before, or the disk failed.
        """
        buffer = np.empty(num_bytes, dtype=np.uint8)
        view, done = buffer.data, 0
        while done < num_bytes:
            try:
                count = os.preadv(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise unreadable(self.path, error) from None
            if count == 0:
                raise CheckpointError(f"{self.path} ends at byte {offset + done}", hint=DAMAGED)
            done += count
        return buffer

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


def read_bytes(path: Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole small file.

    Raises:
        CheckpointError: it is missing, unreadable or longer than ``limit`` bytes.
    """
    try:
        with path.open("rb") as file:
            # One byte more than it should have; a read allocates what is asked for.
            content = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(content) > limit:
        raise CheckpointError(f"{path} is longer than {limit} bytes", hint=DAMAGED)
    return content


def read_text(path: Path) -> str:
    """Read a small UTF-8 file.

    Raises:
        CheckpointError: as :func:`read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text", hint=DAMAGED) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a small file that holds one JSON object.

    Raises:
        CheckpointError: as :func:`read_bytes`, or it is not a JSON object.
    """
    return parse_object(read_bytes(path), str(path))


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """Parse one JSON object in which no key stands twice.

    Args:
        content: UTF-8 bytes.
        name: what the bytes are, for the message.

    Raises:
        CheckpointError: it is no JSON object, or a key stands twice.
    """
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is no JSON: {error}", hint=DAMAGED) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is no JSON object", hint=DAMAGED)
    return value


def sha256_file(path: Path, *, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file as hexadecimal digits, read in chunks.

    Args:
        path: the file; links are followed, because the hub's cache is made of them.
        progress: called with the number of bytes hashed since the last call.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK):
                digest.update(chunk)
                if progress is not None:
                    progress(len(chunk))
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()


def shown(value: object) -> str:
    """A value from a file as it may stand in a message: its repr on one line, cut after 100 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system refuses to read or write."""
    return CheckpointError(f"{path}: {error.strerror or error}", hint="check that the file exists and its permissions")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} stands twice")
    return result
