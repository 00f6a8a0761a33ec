"""A real mosquitto for all tests of a module, and bridges over fake engines."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from edge.mqtt import EmbeddedBroker, MqttBridge
from edge.service import Service
from edge.settings.mqtt import BrokerAddress, MqttSettings
from tests.edge.mqtt.certificates import Authority
from tests.edge.mqtt.client import TIMEOUT_S, Client
from tests.fakes import FakeEngine, make_service

_names = itertools.count(1)


@pytest.fixture(autouse=True, scope="session")
def _mosquitto_is_there() -> None:
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if found is None:
        reason = "these tests need mosquitto: apt-get install mosquitto mosquitto-clients"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(0) as broker:
        yield broker


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The plant's CA."""
    return Authority(tmp_path_factory.mktemp("certificates") / "plant")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody here trusts, although it has the same name."""
    return Authority(tmp_path_factory.mktemp("certificates") / "stranger", "plant")


@dataclass(frozen=True)
class Device:
    """A running device and clients for it."""

    engine: FakeEngine
    service: Service
    bridge: MqttBridge
    name: str
    client: Callable[..., Client]
    """Makes a connected client; ``protocol`` and ``extra`` as for :class:`Client`."""


MakeDevice = Callable[..., Device]


@pytest.fixture
def make_device(broker: EmbeddedBroker) -> Iterator[MakeDevice]:
    """Start a device of a name of its own on the broker; everything ends with the test. More are settings of MQTT."""
    with ExitStack() as stack:

        def make(
            engine: FakeEngine | None = None,
            *,
            max_queue: int = 8,
            address: BrokerAddress = broker.address,
            **settings: Any,
        ) -> Device:
            engine = engine or FakeEngine()
            service = make_service(engine, max_queue=max_queue)
            name = settings.pop("device", f"device-{next(_names)}")
            bridge = MqttBridge(service, MqttSettings(device=name, keepalive_s=5, **settings), address)
            service.start()
            bridge.start()
            stack.callback(lambda: (engine.gate.set(), service.stop(), bridge.stop()))
            wait_until(lambda: bridge.connected)

            def client(protocol: str = "5", extra: tuple[str, ...] = ()) -> Client:
                asking = Client(address, f"client-{next(_names)}", name, protocol=protocol, extra=extra)
                return stack.enter_context(asking)

            return Device(engine, service, bridge, name, client)

        yield make


def wait_until(condition: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    """Poll a condition; fails when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def accepts(port: int) -> bool:
    """Whether something listens on a loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
