"""The adapters that requests can choose: those of the bundle, and those in a folder that may change while serving."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge.adapter import CONFIG, NAME, TENSORS, AdapterConfig, read_config
from edge.bundle import Manifest
from edge.engine.heap import trim_heap
from edge.engine.lora import Adapter, Places
from edge.errors import AdapterError, BundleError

log = logging.getLogger(__name__)

_MOST_KEPT = 4
"""Adapters kept in memory beside those that sequences use: the last ones asked for."""
_Version = tuple[tuple[int, int], ...]
"""Size and time of change of an adapter's files."""


@dataclass(frozen=True)
class _Found:
    """An adapter on disk."""

    version: _Version
    read: Callable[[], Adapter]


class Adapters:
    """Finds adapters by name. Thread-safe.

    A folder with an adapter that is put into ``folder`` (complete: move it there) is found when a request names it; one
    that is replaced or removed, too. Requests that run keep the adapter they have. What cannot be used is not found,
    and the log says why.

    Args:
        places: of the loaded graph.
        bundle: the bundle's folder; the caller has verified it.
        manifest: its manifest.
        folder: where further adapters lie, each a folder as PEFT saves it; None = nowhere.

    Raises:
        BundleError: there is a folder, but the graph has no places for adapters.
    """

    def __init__(self, places: Places, bundle: Path, manifest: Manifest, folder: Path | None = None) -> None:
        if folder is not None and not places.linears:
            hint = "export it with at least one --adapter NAME=DIR, or unset model.adapters"
            raise BundleError(f"{bundle} has no places for LoRA adapters", hint=hint)
        self._places = places
        self._bundle = bundle
        self._manifest = manifest
        self._folder = folder
        self._kept: OrderedDict[str, tuple[_Version, Adapter]] = OrderedDict()
        self._refused: dict[str, _Version] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """What is there; whether it can be used shows when it is asked for."""
        return sorted(self._all())

    def find(self, name: str) -> Adapter | None:
        """The adapter of that name, read from disk unless it is in memory; None if there is none that can be used."""
        with self._lock:
            found = self._all().get(name)
            if found is None or self._refused.get(name) == found.version:
                self._kept.pop(name, None)
                return None
            version, adapter = self._kept.pop(name, (None, None))
            if adapter is None or version != found.version:
                adapter = self._read(name, found)
            if adapter is not None:
                self._kept[name] = found.version, adapter
                while len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
            return adapter

    def _read(self, name: str, found: _Found) -> Adapter | None:
        try:
            adapter = found.read()
        except (AdapterError, MemoryError) as error:
            log.warning("the adapter %s cannot be used: %s", name, error or "out of memory")
            if isinstance(error, AdapterError):
                self._refused[name] = found.version
            return None
        trim_heap()  # the file and its transposed copies were as large again
        log.info("loaded the adapter %s", name)
        return adapter

    def _all(self) -> Mapping[str, _Found]:
        """What is on disk; the bundle's come first."""
        return self._in_folder() | self._in_bundle()

    def _in_bundle(self) -> dict[str, _Found]:
        def reader(file: str, config: AdapterConfig) -> Callable[[], Adapter]:
            return lambda: self._places.read(self._bundle / file, config)

        return {
            entry.name: _Found((), reader(entry.file, AdapterConfig(entry.rank, entry.scale)))
            for entry in self._manifest.adapters
        }

    def _in_folder(self) -> dict[str, _Found]:
        def reader(path: Path) -> Callable[[], Adapter]:
            return lambda: self._places.read(path / TENSORS, read_config(path / CONFIG))

        found = {}
        for path in [] if self._folder is None else _subfolders(self._folder):
            version = _version(path)
            if version is not None and NAME.fullmatch(path.name):
                found[path.name] = _Found(version, reader(path))
        return found


def _subfolders(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        log.warning("%s cannot be read: %s", folder, error.strerror)
        return []


def _version(path: Path) -> _Version | None:
    """None where the folder is no adapter's."""
    try:
        stats = [(path / name).stat() for name in (CONFIG, TENSORS)]
    except OSError:
        return None
    return tuple((info.st_size, info.st_mtime_ns) for info in stats)
