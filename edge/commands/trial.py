"""Serving the store's active bundle: one that was just switched to must show that it works, or is left."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edge.commands.loading import bundle_of, load, store_of
from edge.config import Settings
from edge.errors import BundleError, ConfigError, UnavailableError
from edge.store import Installed, Store

if TYPE_CHECKING:  # this brings onnxruntime
    from edge.service import Service

log = logging.getLogger(__name__)

WORKS_AFTER_S = 60.0
"""Seconds of serving after which a bundle counts as one that works."""
CHECK_EVERY_S = 1.0
EXIT_STALLED = 6


class Start:
    """One start of a server, of the configured folder or of the store's active bundle; made by :func:`starting`."""

    def __init__(self, settings: Settings, store: Store | None) -> None:
        self.store = store
        """None where a folder is served."""
        self.installed: Installed | None = None
        """What was loaded from the store."""
        self._settings = settings
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def load(self, imports: Sequence[str]) -> Service:
        """Load what is served; where the active bundle is damaged, the one before.

        Raises:
            BundleError: it is damaged, and so is the one before, if there is one.
            QwedgeError: as :func:`edge.commands.loading.load`.
        """
        if self.store is None:
            return load(self._settings, imports=imports)
        try:
            self.installed = self.store.starting()
            return self._load(imports)
        except BundleError as error:
            path = self.store.active_path()
            instead = self.store.failed(path.name) if path is not None else None
            if instead is None:
                raise
            log.error("%s", error)  # noqa: TRY400 - the user's error, not a fault of ours
            self.installed = instead
            return self._load(imports)

    def watch(self, service: Service) -> None:
        """From now on see whether the bundle works; where the engine stalls, leave it and end the process."""
        if self.store is not None and self.installed is not None:
            self._watcher = threading.Thread(
                target=self._watch, args=(self.store, self.installed.name, service), name="trial", daemon=True
            )
            self._watcher.start()

    def switched(self, installed: Installed) -> None:
        """Another bundle is served, which has been put to the test already: no more need to watch."""
        self._ended.set()
        self.installed = installed

    def end(self, *, wanted: bool) -> None:
        """The server has ended; a start on trial does not count where that was wanted."""
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()
        if wanted and self.store is not None and self.installed is not None:
            self.store.stopped(self.installed.name)

    def _load(self, imports: Sequence[str]) -> Service:
        if self.installed is None:
            return load(self._settings, imports=imports)
        return load(self._settings, bundle=self.installed.path, imports=imports)

    def _watch(self, store: Store, name: str, service: Service) -> None:
        works_at = time.monotonic() + WORKS_AFTER_S
        while not self._ended.wait(CHECK_EVERY_S):
            if service.stats().stalled:
                if store.failed(name) is not None:
                    log.critical("the engine makes no progress: the next start serves the bundle before")
                    os._exit(EXIT_STALLED)
                return
            if time.monotonic() >= works_at:
                store.healthy(name)
                return


@contextmanager
def starting(settings: Settings) -> Iterator[Start]:
    """One start of a server; what ends it in the block says whether it counts against a bundle on trial.

    Raises:
        ConfigError: nothing is configured or active.
        StoreError: the store cannot be read.
    """
    bundle_of(settings)
    start = Start(settings, store_of(settings) if settings.model.bundle is None else None)
    wanted = False
    try:
        yield start
        wanted = True
    except (KeyboardInterrupt, ConfigError, UnavailableError):
        wanted = True  # not the bundle's fault
        raise
    finally:
        start.end(wanted=wanted)
