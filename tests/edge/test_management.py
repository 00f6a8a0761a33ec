"""Switching, verifying and going back, with real bundles in a real store on the real engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.bundle import WEIGHTS
from edge.errors import BundleError, ConfigError, ConflictError, QwedgeError, RequestError, StoreError
from edge.management import Management
from tests.edge.managed import TIMEOUT_S, Device, export_two, managed
from tests.edge.test_scheduler import until


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_two(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def device(exported: Path, tmp_path: Path) -> Iterator[Device]:
    with managed(exported, tmp_path) as device:
        yield device


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


@pytest.mark.parametrize("kind", ["switch", "rollback"])
def test_a_model_that_worked_once_and_does_not_load_any_more_is_left_too(device: Device, kind: str) -> None:
    device.management.begin("switch", "second")
    device.end()
    device.broken.add("first")
    device.management.begin(kind, "first" if kind == "switch" else None)  # type: ignore[arg-type]
    assert device.end().state == "failed"
    assert (device.served, device.active) == ("second", "second")


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
    with pytest.raises(RequestError if name is None else StoreError):
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


def test_weights_leave_the_memory_and_come_back(device: Device) -> None:
    device.management.unload()
    until(lambda: device.service.stats().asleep)
    device.management.unload()  # twice is no more
    device.management.load()
    assert not device.service.stats().asleep
    assert device.served == "first"
    device.management.unload()
    until(lambda: device.service.stats().asleep)
    assert device.served == "first"


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
