"""Turn what the user typed into a checkpoint on disk: a catalog name, a folder, a GGUF file or a hub id."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge.errors import CheckpointError
from export.catalog import CatalogEntry, catalog
from export.checkpoint import Checkpoint, Origin, open_checkpoint
from export.files import sha256_file, unreadable
from export.hub import FOLDER_PATTERNS, Hub, Snapshot
from export.pieces import assemble
from export.progress import Progress, Silent, step

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LOCAL_HINT = "give a Hugging Face folder or a GGUF file that is on this machine"


@dataclass(frozen=True)
class Resolved:
    """A checkpoint that is on this machine."""

    path: Path
    """The folder or the GGUF file."""
    origin: Origin
    entry: CatalogEntry | None = None
    """What the catalog knows about it, when it was asked for by its catalog name."""

    def open(self) -> Checkpoint:
        """Open it.

        Raises:
            CheckpointError: it is damaged or not supported.
        """
        return open_checkpoint(self.path, origin=self.origin)


def default_cache() -> Path:
    """``$QWEDGE_CACHE``, ``$XDG_CACHE_HOME/qwedge`` or ``~/.cache/qwedge``."""
    if chosen := os.environ.get("QWEDGE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwedge"


def resolve(
    source: str, *, cache: Path, offline: bool = False, progress: Progress | None = None, endpoint: str | None = None
) -> Resolved:
    """Find a checkpoint, downloading it if it must.

    A catalog name wins over a file of the same name (write ``./name`` for that one), and a path over a hub id. What was
    downloaded before is taken from the cache without asking the network.

    Args:
        source: what the user typed.
        cache: folder for downloads.
        offline: never use the network.
        progress: draws downloads and hashing.
        endpoint: URL of another hub.

    Raises:
        CheckpointError: there is no such thing, it cannot be downloaded, or it arrived damaged.
    """
    hub = Hub(cache / "hub", endpoint) if endpoint else Hub(cache / "hub")
    if entry := catalog().get(source.lower()):
        return resolve_entry(entry, cache=cache, offline=offline, progress=progress, hub=hub)
    if source and (path := Path(source).expanduser()).exists():
        kind = "folder" if path.is_dir() else "gguf"
        return Resolved(path, Origin(kind, path.resolve().name))
    if _HUB_ID.fullmatch(source):
        with _translated_errors(cache):
            return _Fetcher(cache, hub, progress or Silent(), offline=offline).repository(source)
    close = difflib.get_close_matches(source.lower(), catalog(), n=1)
    hint = f"did you mean {close[0]}?" if close else "see the catalog: qwedge export --list"
    raise CheckpointError(f"{source} is no folder, GGUF file, hub id or catalog name", hint=hint)


def resolve_entry(
    entry: CatalogEntry, *, cache: Path, offline: bool = False, progress: Progress | None = None, hub: Hub | None = None
) -> Resolved:
    """Find the checkpoint of one catalog entry; see :func:`resolve`."""
    with _translated_errors(cache):
        return _Fetcher(cache, hub or Hub(cache / "hub"), progress or Silent(), offline=offline).entry(entry)


@contextmanager
def _translated_errors(cache: Path) -> Iterator[None]:
    """A full disk or a missing permission is the user's to mend, wherever it shows."""
    try:
        yield
    except OSError as error:
        raise unreadable(Path(error.filename or cache), error) from None


class _Fetcher:
    """One resolve with its settings."""

    def __init__(self, cache: Path, hub: Hub, progress: Progress, *, offline: bool) -> None:
        self.cache = cache
        self.hub = hub
        self.progress = progress
        self.offline = offline

    def entry(self, entry: CatalogEntry) -> Resolved:
        """A catalog entry: from the cache, the hub, or the packages that carry it."""
        if entry.file is None:
            snapshot = self.snapshot(entry.hub, FOLDER_PATTERNS, entry.download_bytes, entry.revision)
            return Resolved(snapshot.folder, Origin("catalog", entry.name, snapshot.revision), entry)
        assembled = self.cache / "gguf" / entry.file
        if assembled.is_file() and self.is_intact(assembled, entry):
            return Resolved(assembled, Origin("catalog", entry.name), entry)
        try:
            return self.file_from_hub(entry, entry.file)
        except CheckpointError:
            if not entry.pieces or self.offline:
                raise
        self.assemble(entry, assembled)
        return Resolved(assembled, Origin("catalog", entry.name), entry)

    def file_from_hub(self, entry: CatalogEntry, name: str) -> Resolved:
        snapshot = self.snapshot(entry.hub, (name,), entry.download_bytes, entry.revision)
        path = snapshot.folder / name
        if not self.is_intact(path, entry):
            raise CheckpointError(f"{name} from {entry.hub} is not the pinned file", hint="run it again")
        return Resolved(path, Origin("catalog", entry.name, snapshot.revision), entry)

    def repository(self, repo: str) -> Resolved:
        """A repository of the hub with safetensors."""
        snapshot = self.snapshot(repo, FOLDER_PATTERNS, None, None)
        return Resolved(snapshot.folder, Origin("hub", repo, snapshot.revision))

    def snapshot(self, repo: str, patterns: tuple[str, ...], num_bytes: int | None, revision: str | None) -> Snapshot:
        if cached := self.hub.cached(repo, patterns, revision):
            return cached
        if self.offline:
            raise CheckpointError(f"{repo} is not in the cache and the network is off", hint=_LOCAL_HINT)
        if not self.hub.answers():
            raise CheckpointError(f"the hub {self.hub.endpoint} does not answer", hint=_LOCAL_HINT)
        self.make_room(num_bytes or 0)
        return self.hub.download(repo, patterns, self.progress, revision=revision)

    def assemble(self, entry: CatalogEntry, destination: Path) -> None:
        # A wheel of the largest part lies beside the growing file.
        self.make_room(entry.download_bytes + max(piece.size for piece in entry.pieces))
        destination.parent.mkdir(parents=True, exist_ok=True)
        assemble(entry.pieces, destination, self.progress)
        if not self.is_intact(destination, entry):
            raise CheckpointError(f"{entry.file} was put together wrongly", hint="run it again")

    def is_intact(self, path: Path, entry: CatalogEntry) -> bool:
        """Whether the file is the pinned one; one that is not is removed."""
        with step(self.progress, f"verifying {path.name}", path.stat().st_size) as advance:
            intact = entry.sha256 in (None, sha256_file(path, progress=advance))
        if not intact:
            path.resolve().unlink()
        return intact

    def make_room(self, num_bytes: int) -> None:
        """See that the cache is there and has space, before minutes of download end in an error."""
        self.cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache).free
        if free < num_bytes:
            message = f"{self.cache} has {free >> 20} MiB free, the download needs {num_bytes >> 20} MiB"
            raise CheckpointError(message, hint="free some space, or choose another place with QWEDGE_CACHE")
