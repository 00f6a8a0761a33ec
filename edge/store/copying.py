"""Copying a bundle into the store: resumed where it stopped, linked where the store has the file, whole or not there.

While it is copied, a bundle is a hidden folder ``.NAME.partial`` beside the others with the files that are complete,
and a file ``.NAME.part`` with the beginning of the next one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from edge.bundle import (
    MANIFEST,
    SIGNATURE,
    FileEntry,
    Manifest,
    Progress,
    hash_file,
    move_durably,
    read_manifest,
)
from edge.durable import replace_durably
from edge.errors import BundleError, StoreError
from edge.store.disk import discard
from edge.store.source import Source

CHUNK = 1 << 20
FLUSH_BYTES = 64 << 20
"""Written between two flushes, so that a power cut costs no more of a copy."""
RESERVE_BYTES = 16 << 20
"""Left free beside a bundle, for the state and the journal."""


def copy_bundle(source: Source, manifest: Manifest, destination: Path, progress: Progress | None) -> None:
    """Copy a bundle; where it is there already, repair what is damaged and take over a signature.

    Args:
        source: where it lies.
        manifest: what its manifest says; the caller has checked the signature.
        destination: its folder in the store; the folders beside it are bundles too.
        progress: called with bytes done since the last call.

    Raises:
        BundleError: a file is missing or was changed.
        StoreError: there is no room.
        OSError: a disk refused.
    """
    copying = _Copying(source, destination, progress or _ignore)
    copying.prepare(manifest)
    for entry in manifest.files:
        copying.bring(entry)
    copying.publish()


class _Copying:
    """One bundle on its way into the store."""

    def __init__(self, source: Source, destination: Path, progress: Progress) -> None:
        self._source = source
        self._destination = destination
        self._repairs = destination.exists()
        self._staging = destination if self._repairs else destination.with_name(f".{destination.name}.partial")
        self._part = destination.with_name(f".{destination.name}.part")
        self._progress = progress
        self._twins = _files_of_bundles(path for path in destination.parent.iterdir() if path != destination)

    def prepare(self, manifest: Manifest) -> None:
        """Make the folder, take out of it what does not belong there, and see whether there is room for the rest."""
        self._staging.mkdir(exist_ok=True)
        for path in self._staging.iterdir():
            if path.name not in {MANIFEST, SIGNATURE, *(entry.path for entry in manifest.files)}:
                discard(path)
        begun = self._part.stat().st_size if self._part.exists() else 0
        missing = sum(entry.size for entry in manifest.files if not self._has(entry)) - begun
        free = shutil.disk_usage(self._staging).free - RESERVE_BYTES
        if missing > free:
            message = f"{manifest.name} takes {missing / 1e6:,.1f} MB, and there are {max(free, 0) / 1e6:,.1f} MB free"
            raise StoreError(message, hint="`qwedge gc` removes bundles that are not in use")

    def bring(self, entry: FileEntry) -> None:
        """Have one file in the folder: as it is there, linked, or copied."""
        target = self._staging / entry.path
        if target.exists() and self._is(target, entry):
            return
        target.unlink(missing_ok=True)
        if not self._link(entry, target):
            self._copy(entry)
            self._part.rename(target)

    def publish(self) -> None:
        """Give the folder its name, now that all files are on the disk."""
        self._write(MANIFEST, self._source.manifest)
        if self._source.signature is not None:
            self._write(SIGNATURE, self._source.signature)
        if not self._repairs:
            move_durably(self._staging, self._destination)

    def _write(self, name: str, data: bytes) -> None:
        path = self._staging / name
        if not path.exists() or path.read_bytes() != data:
            replace_durably(path, data)

    def _has(self, entry: FileEntry) -> bool:
        return (self._staging / entry.path).exists() or (entry.path, entry.sha256) in self._twins

    def _is(self, path: Path, entry: FileEntry) -> bool:
        return path.lstat().st_size == entry.size and hash_file(path, progress=self._progress) == entry

    def _link(self, entry: FileEntry, target: Path) -> bool:
        """Whether an installed bundle has the file, undamaged, on a file system with links."""
        twin = self._twins.get((entry.path, entry.sha256))
        if twin is None:
            return False
        with suppress(OSError):
            target.hardlink_to(twin)
            if self._is(target, entry):
                return True
        target.unlink(missing_ok=True)
        return False

    def _copy(self, entry: FileEntry) -> None:
        """Copy a file to ``.part``, going on where an earlier copy stopped."""
        resumed = self._part.exists()
        if resumed and self._append(entry) == entry.sha256:
            return
        # What the disk kept of the earlier copy was of another file, or not all that was written before a power cut.
        self._part.unlink(missing_ok=True)
        if self._append(entry) != entry.sha256:
            self._part.unlink()
            message = f"{entry.path} of {self._source.path} was changed: its SHA-256 is not the manifest's"
            raise BundleError(message, hint="the copy is damaged or was changed: copy or export the bundle again")

    def _append(self, entry: FileEntry) -> str:
        """Fill ``.part`` up to the file's size; gives the SHA-256 of all of it."""
        digest = hashlib.sha256()
        source, start = self._source.open(entry)
        with source, _open_part(self._part) as part:
            done = 0
            while chunk := part.read(CHUNK):
                done += self._count(chunk, digest)
            while done < entry.size:
                chunk = self._source.read(source, start + done, min(CHUNK, entry.size - done))
                part.write(chunk)
                done += self._count(chunk, digest)
                if done % FLUSH_BYTES < CHUNK:
                    _flush(part)
            part.truncate(entry.size)
            _flush(part)
        return digest.hexdigest()

    def _count(self, chunk: bytes, digest: hashlib._Hash) -> int:
        digest.update(chunk)
        self._progress(len(chunk))
        return len(chunk)


def _files_of_bundles(folders: Iterable[Path]) -> dict[tuple[str, str], Path]:
    """The files of bundles, by name and SHA-256 as their manifests say."""
    files: dict[tuple[str, str], Path] = {}
    for path in folders:
        if path.name.startswith("."):
            continue
        with suppress(BundleError):  # a damaged bundle has nothing to offer
            files |= {(entry.path, entry.sha256): path / entry.path for entry in read_manifest(path).files}
    return files


def _open_part(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+b")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _ignore(_count: int) -> None:
    """Nobody watches."""
