"""One start of a server: whether it works, and what becomes of one that does not.

A bundle that was just switched to must show that it works, or is left. Starts that end by themselves are counted, until
one is in safe mode.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edge.bundle import read_manifest
from edge.commands.loading import bundle_of, load, store_of
from edge.commands.safe_mode import explain, safe_settings
from edge.config import Settings
from edge.errors import BundleError, ConfigError, UnavailableError
from edge.settings.folders import device_folder
from edge.starts import MAX_DEATHS, StartCounter, boot_id
from edge.store import Installed, Store

if TYPE_CHECKING:  # this brings onnxruntime
    from edge.service import Service

log = logging.getLogger(__name__)

WORKS_AFTER_S = 60.0
"""Seconds of serving after which a bundle counts as one that works, and a start as one that did."""
CHECK_EVERY_S = 1.0
EXIT_STALLED = 6


class Start:
    """One start of a server, of the configured folder or of the store's active bundle; made by :func:`starting`."""

    def __init__(self, settings: Settings, store: Store | None) -> None:
        self.settings = settings
        """What to serve with: what is configured, or less from :meth:`begin` on."""
        self.problem: str | None = None
        """Why it is less; None where it is not."""
        self.store = store
        """None where a folder is served."""
        self.installed: Installed | None = None
        """What was loaded from the store."""
        self._counter = StartCounter(_counter_folder(settings), boot_id())
        self._begun = time.monotonic()
        self._ready_s: float | None = None
        self._ended, self._switched = threading.Event(), threading.Event()
        self._watcher: threading.Thread | None = None

    def begin(self) -> None:
        """Choose what to load, and count the start; after too many that ended by themselves, it is in safe mode.

        Raises:
            BundleError: the active bundle's manifest cannot be read, and there is none before it.
        """
        try:
            self.installed = None if self.store is None else self.store.starting()
        except BundleError as error:
            self.installed = self._instead_of_active(error)
        path = bundle_of(self.settings) if self.installed is None else self.installed.path
        deaths = self._counter.begin(path.name)
        if deaths >= MAX_DEATHS:
            self.problem = explain(deaths, self._counter.retry_after_s)
            self.settings = safe_settings(self.settings, read_manifest(path).context_length)
            log.error("%s", self.problem)

    def load(self, imports: Sequence[str]) -> Service:
        """Load what is served; where the active bundle is damaged, the one before.

        Raises:
            BundleError: it is damaged, and so is the one before, if there is one.
            QwedgeError: as :func:`edge.commands.loading.load`.
        """
        try:
            return self._load(imports)
        except BundleError as error:
            self.installed = self._instead_of_active(error)
            return self._load(imports)

    @property
    def is_retry(self) -> bool:
        """Whether safe mode tries to do without itself: whatever ends this start, the next one is safe again."""
        return self._counter.is_retry

    def watch(self, service: Service, begin_anew: Callable[[], object]) -> None:
        """From now on see whether it works; where the engine stalls on a bundle of the store, leave that and end.

        Args:
            service: what is watched.
            begin_anew: called to try a normal start after a while in safe mode, when nobody is being answered.
        """
        self._watcher = threading.Thread(target=self._watch, args=(service, begin_anew), name="trial", daemon=True)
        self._watcher.start()

    def ready(self) -> None:
        """It answers from now on."""
        self._ready_s = time.monotonic() - self._begun

    def leaving(self) -> None:
        """It was asked to end: what happens now is no crash."""
        self._counter.works(self._ready_s)

    def switched(self, installed: Installed) -> None:
        """Another bundle is served, which has been put to the test already; what safe mode left out still is."""
        self._switched.set()
        self._counter.works(self._ready_s)
        self.installed = installed

    def end(self, *, wanted: bool) -> None:
        """The server has ended; a start on trial does not count where that was wanted."""
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()
        if wanted:
            self._counter.works(self._ready_s)
            if self.store is not None and self.installed is not None:
                self.store.stopped(self.installed.name)
        self._counter.close()

    def _instead_of_active(self, error: BundleError) -> Installed:
        """What the store has in place of its active bundle, which does not load."""
        path = None if self.store is None else self.store.active_path()
        instead = None if self.store is None or path is None else self.store.failed(path.name)
        if instead is None:
            raise error
        log.error("%s", error)
        return instead

    def _load(self, imports: Sequence[str]) -> Service:
        if self.installed is None:
            return load(self.settings, imports=imports)
        return load(self.settings, bundle=self.installed.path, imports=imports)

    def _watch(self, service: Service, begin_anew: Callable[[], object]) -> None:
        store, name = self.store, "" if self.installed is None else self.installed.name
        works_at = time.monotonic() + WORKS_AFTER_S
        while not self._ended.wait(CHECK_EVERY_S):
            if not self._switched.is_set():
                if service.stats().stalled:
                    if store is not None and store.failed(name) is not None:
                        log.critical("the engine makes no progress: the next start serves the bundle before")
                        os._exit(EXIT_STALLED)
                    return
                if time.monotonic() < works_at:
                    continue
                self._counter.works(self._ready_s)
                if store is not None:
                    store.healthy(name)
            if self.problem is not None:
                self._leave_safe_mode(service, begin_anew)
            return

    def _leave_safe_mode(self, service: Service, begin_anew: Callable[[], object]) -> None:
        retry_at = time.monotonic() + self._counter.retry_after_s
        while not self._ended.wait(CHECK_EVERY_S):
            stats = service.stats()
            if time.monotonic() >= retry_at and not stats.num_running and not stats.num_waiting:
                log.warning("safe mode has served for a while: a normal start is tried")
                self._counter.retry()
                begin_anew()
                return


def _counter_folder(settings: Settings) -> Path | None:
    try:
        return device_folder(settings.mqtt, os.environ)
    except ConfigError:  # there is no place to count in; a service needs none
        return None


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
    except KeyboardInterrupt:
        wanted = True
        raise
    except (ConfigError, UnavailableError):
        wanted = not start.is_retry  # not the bundle's fault; but safe mode, which tries this start, did without
        raise
    finally:
        start.end(wanted=wanted)
