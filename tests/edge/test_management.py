"""Switching, verifying and going back, with real bundles in a real store on the real engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edge.bundle import WEIGHTS, read_manifest
from edge.config import Settings, load_settings
from edge.errors import BundleError, ConfigError, ConflictError, QwedgeError, StoreError
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    for seed, name in enumerate(NAMES):
        with open_checkpoint(
            tiny.write_folder(folder / f"{name}-checkpoint", tiny.qwen2_config(), seed=seed)
        ) as source:
            export_bundle(source, folder / name, RECIPES["fp32"], name=name, progress=Silent())
    return folder


@dataclass
class Device:
    """A server without front ends."""

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


@pytest.fixture
def device(exported: Path, tmp_path: Path) -> Iterator[Device]:
    store = Store(tmp_path / "store")
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
    yield device
    service.stop()
    management.close()


def test_a_switch_goes_through_its_steps_and_serves_the_other_model(device: Device) -> None:
    begun = device.management.begin("switch", "second")
    assert (begun.kind, begun.state) == ("switch", "running")
    end = device.end()
    assert (end.id, end.state, end.error, end.progress) == (begun.id, "done", None, 1.0)
    assert (device.served, device.active) == ("second", "second")
    steps = [operation.step for operation in device.seen]
    assert list(dict.fromkeys(steps)) == ["", "verifying", "loading", "testing"]
    verifying = [operation.progress for operation in device.seen if operation.step == "verifying"]
    assert verifying == sorted(verifying)
    assert verifying[-1] == 1.0


def test_a_rollback_serves_what_was_served_before(device: Device) -> None:
    device.management.begin("switch", "second")
    device.end()
    device.management.begin("rollback")
    assert device.end().state == "done"
    assert (device.served, device.active) == ("first", "first")


def test_what_is_served_already_is_not_loaded_again(device: Device) -> None:
    device.management.begin("switch", "first")
    assert device.end().state == "done"
    assert device.loads == []


def test_a_damaged_bundle_is_not_switched_to(device: Device) -> None:
    weights = device.store.find("second").path / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    for kind in ("verify", "switch"):
        device.management.begin(kind, "second")  # type: ignore[arg-type]
        end = device.end()
        assert end.state == "failed"
        assert isinstance(end.error, BundleError)
        assert end.describe()["error"]["message"] == end.error.message
    assert device.loads == []
    assert (device.served, device.active) == ("first", "first")


def test_a_model_that_does_not_load_is_left_for_the_one_before(device: Device) -> None:
    device.broken.add("second")
    device.management.begin("switch", "second")
    end = device.end()
    assert end.state == "failed"
    assert isinstance(end.error, BundleError)
    assert device.loads == ["second", "first"]
    assert (device.served, device.active) == ("first", "first")
    assert device.store.find("second").failed


def test_a_sound_bundle_is_found_sound(device: Device) -> None:
    device.management.begin("verify", "second")
    assert device.end().state == "done"
    assert device.served == "first"


def test_one_operation_at_a_time(device: Device) -> None:
    go_on = threading.Event()
    device.management.listen(lambda _operation: go_on.wait(TIMEOUT_S) and None)
    device.management.begin("verify", "first")
    with pytest.raises(ConflictError, match="a verify is running"):
        device.management.begin("switch", "second")
    go_on.set()
    assert device.end().kind == "verify"


@pytest.mark.parametrize(("kind", "name"), [("switch", "third"), ("switch", None), ("verify", "../first")])
def test_a_bundle_that_is_not_there_is_refused(device: Device, kind: str, name: str | None) -> None:
    with pytest.raises(StoreError):
        device.management.begin(kind, name)  # type: ignore[arg-type]
    assert device.management.operation is None


def test_there_is_nothing_to_go_back_to_at_first(device: Device) -> None:
    device.management.begin("rollback")
    end = device.end()
    assert end.state == "failed"
    assert isinstance(end.error, StoreError)
    assert device.served == "first"


def test_a_reload_restarts_where_the_settings_are_sound(device: Device) -> None:
    device.settings_problem = "qwedge.toml: [server] port must be smaller"
    with pytest.raises(ConfigError, match="must be smaller"):
        device.management.begin("reload")
    assert device.restarts == 0
    device.settings_problem = ""
    operation = device.management.begin("reload")
    device.management.close()
    assert device.restarts == 1
    assert device.management.operation == operation  # it is done when the process is back


def test_without_a_store_there_is_nothing_to_switch_to(device: Device) -> None:
    bare = Management(device.service, None, device.load, check_settings=lambda: None, restart=lambda: None, drain_s=0)
    assert not bare.has_store
    for kind in ("switch", "verify", "rollback"):
        with pytest.raises(QwedgeError, match="no model store"):
            bare.begin(kind, "first")  # type: ignore[arg-type]


def test_what_is_served_cannot_be_removed(device: Device) -> None:
    device.management.begin("switch", "second")
    device.end()
    first = device.store.activate("first", test=False)  # by a command, for the next start
    device.store.healthy(first.name)
    with pytest.raises(QwedgeError, match="is being served"):
        device.store.remove("second")
    assert device.served == "second"
