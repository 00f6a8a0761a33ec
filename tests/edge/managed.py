"""A device with a model store, for the tests of management: real bundles in a real store on the real engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edge.bundle import read_manifest
from edge.config import Settings, load_settings
from edge.errors import BundleError, ConfigError
from edge.loader import load_bundle
from edge.management import Management, Operation
from edge.metrics import Metrics
from edge.service import Finished, Loaded, Service
from edge.store import Installed, Store, open_source
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.edge.test_scheduler import Client
from tests.export import tiny

TIMEOUT_S = 60
NAMES = ("first", "second")


def export_two(folder: Path) -> Path:
    """Bundles called :data:`NAMES` in a folder."""
    for seed, name in enumerate(NAMES):
        with open_checkpoint(
            tiny.write_folder(folder / f"{name}-checkpoint", tiny.qwen2_config(), seed=seed)
        ) as source:
            export_bundle(source, folder / name, RECIPES["fp32"], name=name, progress=Silent())
    return folder


@dataclass
class Device:
    """A server of real bundles without front ends."""

    store: Store
    settings: Settings
    service: Service
    management: Management
    seen: list[Operation] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    """Names of models that do not load."""
    restarts: int = 0
    settings_problem: str = ""
    _ended: threading.Event = field(default_factory=threading.Event)

    def load(self, installed: Installed) -> Loaded:
        self.loads.append(installed.model)
        if installed.model in self.broken:
            raise BundleError("onnxruntime refuses it", hint="export it again")
        return load_bundle(installed.path, read_manifest(installed.path), self.settings)

    def note(self, operation: Operation) -> None:
        self.seen.append(operation)
        if operation.state != "running":
            self._ended.set()

    def end(self) -> Operation:
        assert self._ended.wait(TIMEOUT_S)
        self._ended.clear()
        operation = self.management.operation
        assert operation is not None
        return operation

    @property
    def served(self) -> str:
        assert isinstance(Client(self.service, max_tokens=2, ignore_eos=True).end(), Finished)
        return self.service.model.manifest.name

    @property
    def active(self) -> str:
        active = self.store.active()
        assert active is not None
        return active.model


@contextmanager
def managed(exported: Path, folder: Path) -> Iterator[Device]:
    """A running device that serves the first of the exported bundles from a store in ``folder``."""
    store = Store(folder / "store")
    for name in NAMES:
        store.install(open_source(exported / name))
    first = store.activate("first", test=False)
    store.healthy(first.name)
    settings = load_settings(env={}, flags={"engine.context": 128, "engine.slots": 2, "engine.threads": 1})
    service = Service(load_bundle(first.path, read_manifest(first.path), settings), Metrics())
    service.start()

    def load(installed: Installed) -> Loaded:
        return device.load(installed)

    def restart() -> None:
        device.restarts += 1

    def check_settings() -> None:
        if device.settings_problem:
            raise ConfigError(device.settings_problem)

    management = Management(
        service,
        store,
        load,
        check_settings=check_settings,
        restart=restart,
        drain_s=5.0,
    )
    management.serving(first)
    device = Device(store, settings, service, management)
    management.listen(device.note)
    try:
        yield device
    finally:
        service.stop()
        management.close()
