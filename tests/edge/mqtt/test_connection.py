"""The link: kept up, healed, told from a refusal, and without delayed packets."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from edge.mqtt import EmbeddedBroker, MqttBridge
from edge.mqtt.connection import BACKOFF_S, backoff_s
from edge.settings.mqtt import MqttSettings
from tests.edge.mqtt.client import Client, chat, text_of
from tests.edge.mqtt.conftest import MakeDevice, wait_until
from tests.edge.mqtt.proxy import Proxy, Treatment
from tests.fakes import FakeEngine, make_service

pytestmark = pytest.mark.broker


@pytest.fixture
def own_broker() -> Iterator[EmbeddedBroker]:
    """A broker that the test may kill."""
    with EmbeddedBroker(0) as broker:
        yield broker


def test_status_info_and_load_are_retained(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(slots=3), max_queue=7)
    late = device.client("3.1.1", extra=(f"qwedge/v1/dev/{device.name}/+",))
    topics = {f"qwedge/v1/dev/{device.name}/{kind}" for kind in ("status", "info", "load")}
    late.wait(lambda: {message.topic for message in late.received} == topics)
    assert all(message.retain or message.topic.endswith("/load") for message in late.received)
    by_kind = {message.topic.rsplit("/", 1)[-1]: message.value for message in late.received}
    assert by_kind["status"] == b"online"
    assert (by_kind["info"].limits.slots, by_kind["info"].limits.max_queue) == (3, 7)
    assert by_kind["info"].models[0].context_length == device.service.model.context_length
    assert (by_kind["load"].slots, by_kind["load"].busy, by_kind["load"].queue) == (3, 0, 0)


def test_load_follows_the_work_at_most_once_a_second(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(slots=1))
    topic = f"qwedge/v1/dev/{device.name}/load"
    client = device.client(extra=(topic,))
    device.engine.gate.clear()
    began = time.monotonic()
    for number in range(3):
        client.send(str(number), chat("x"))
    client.wait(lambda: any(m.topic == topic and (m.value.busy, m.value.queue) == (1, 2) for m in client.received))
    device.engine.gate.set()
    client.wait(lambda: any(m.topic == topic and m.value.tokens_per_s > 0 for m in client.received))
    num_messages = len([message for message in client.received if message.topic == topic])
    assert num_messages <= time.monotonic() - began + 2


def test_a_lost_link_is_announced_by_the_last_will_and_heals(make_device: MakeDevice) -> None:
    device = make_device()
    topic = f"qwedge/v1/dev/{device.name}/status"
    client = device.client(extra=(topic,))
    link = device.bridge._connection.socket()
    assert link is not None
    link.shutdown(socket.SHUT_RDWR)
    client.wait(lambda: [m.value for m in client.received if m.topic == topic][-2:] == [b"offline", b"online"])
    client.send("1", chat("x"))
    assert client.done("1").status == 200


def test_a_device_that_stops_says_so(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device()
    device.bridge.stop()
    assert not device.bridge.connected
    topic = f"qwedge/v1/dev/{device.name}/status"
    with Client(broker.address, "watcher", device.name, extra=(topic,)) as watcher:
        watcher.wait(lambda: [m.value for m in watcher.received if m.topic == topic] == [b"offline"])


def test_requests_that_run_when_the_bridge_stops_get_503(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(lambda _: "z" * 4000, step_s=0.01))
    client = device.client()
    client.send("1", chat("x"))
    client.event("1", "started")
    device.bridge.stop()
    assert client.done("1").status == 503


def test_requests_that_run_when_the_bridge_stops_may_finish_in_time(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(step_s=0.02))
    client = device.client()
    client.send("1", chat("x"))
    client.event("1", "started")
    device.bridge.stop(drain_s=10)
    assert text_of(client.done("1")) == "You said: x"


def test_a_killed_broker_comes_back_and_no_outcome_is_lost(own_broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device(address=own_broker.address)
    client = device.client()
    device.engine.gate.clear()
    client.send("1", chat("over the gap"))
    client.event("1", "started")
    assert own_broker.pid is not None
    os.kill(own_broker.pid, signal.SIGKILL)
    wait_until(lambda: not device.bridge.connected)
    device.engine.gate.set()
    wait_until(lambda: device.bridge.stats().num_outcomes == 1)
    wait_until(lambda: own_broker.restarts == 1 and device.bridge.connected)
    client._subscribed.clear()
    assert client._subscribed.wait(60)
    client.send("1", chat("over the gap", attempt=2))
    assert text_of(client.done("1")) == "You said: over the gap"
    client.send("2", chat("again"))
    assert client.done("2").status == 200


def test_an_outcome_waits_for_the_link(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    with Proxy(broker.address) as proxy:
        device = make_device(address=proxy.address)
        with Client(broker.address, "patient", device.name) as client:
            device.engine.gate.clear()
            client.send("1", chat("x", stream=True))
            client.event("1", "started")
            proxy.treatment = "close"
            link = device.bridge._connection.socket()
            assert link is not None
            link.shutdown(socket.SHUT_RDWR)
            wait_until(lambda: not device.bridge.connected)
            device.engine.gate.set()
            wait_until(lambda: device.bridge.stats().num_outcomes == 1)
            assert client.of("1", "done") == []
            proxy.treatment = "pass"
            assert text_of(client.done("1")) == "You said: x"


def test_a_dead_link_is_noticed_within_two_keepalives(broker: EmbeddedBroker) -> None:
    service = make_service()
    service.start()
    with Proxy(broker.address) as proxy:
        bridge = MqttBridge(service, MqttSettings(device="half-open", keepalive_s=2), proxy.address)
        bridge.start()
        wait_until(lambda: bridge.connected)
        proxy.stall()
        began = time.monotonic()
        wait_until(lambda: not bridge.connected)
        assert time.monotonic() - began < 2 * 2 + 1
        proxy.resume()
        wait_until(lambda: bridge.connected)
        bridge.stop()
    service.stop()


@pytest.mark.parametrize("treatment", ["refuse", "close"])
def test_a_broker_without_mqtt5_is_spoken_to_in_3_1_1(
    broker: EmbeddedBroker, make_device: MakeDevice, treatment: Treatment
) -> None:
    with Proxy(broker.address, treatment) as proxy:
        device = make_device(address=proxy.address)
        assert device.bridge.stats().protocol == "3.1.1"
        with Client(broker.address, "old", device.name, protocol="3.1.1") as client:
            client.send("kept", chat("x"), retain=True)
            client.send("1", chat("x", stream=True))
            assert text_of(client.done("1")) == "You said: x"
            assert "".join(batch.text for batch in client.of("1", "tok")) == "You said: x"
            client.publish(f"{client.device}/req/{client.name}/kept", b"", retain=True)
        with Client(broker.address, "new", device.name) as client:
            client.send("1", chat("x"))
            assert client.done("1").status == 200


@pytest.mark.parametrize(("treatment", "reason"), [("unauthorized", "Not authorized"), ("garbage", "no connection")])
def test_a_refusal_is_reported_and_is_no_connection(
    broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture, treatment: Treatment, reason: str
) -> None:
    service = make_service()
    service.start()
    with Proxy(broker.address, treatment) as proxy, caplog.at_level(logging.INFO, "edge.mqtt.connection"):
        bridge = MqttBridge(service, MqttSettings(device="refused"), proxy.address)
        bridge.start()
        wait_until(lambda: proxy.num_connections >= 3)
        assert not bridge.connected
        bridge.stop()
    service.stop()
    reports = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([line for line in reports if reason in line]) == 1, "said once, not with every attempt"


def test_two_devices_of_one_name_are_told_so(broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture) -> None:
    service = make_service()
    service.start()
    twins = [MqttBridge(service, MqttSettings(device="twin"), broker.address) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for twin in twins:
            twin.start()
        wait_until(lambda: "does another device use the name qwedge-twin?" in caplog.text)
        for twin in twins:
            twin.stop()
    service.stop()


def test_a_broker_that_is_away_is_reported_once_and_found_when_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    service = make_service()
    service.start()
    broker = EmbeddedBroker(port)
    with caplog.at_level(logging.WARNING):
        bridge = MqttBridge(service, MqttSettings(device="early"), broker.address)
        bridge.start()
        time.sleep(1.0)
        lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert f"127.0.0.1:{port}: no connection: Connection refused; trying again" in lines[0]
    with broker:
        wait_until(lambda: bridge.connected)
        bridge.stop()
    service.stop()


def test_a_bridge_without_a_broker_stops_at_once() -> None:
    service = make_service()
    service.start()
    bridge = MqttBridge(service, MqttSettings(device="alone"), EmbeddedBroker(1).address)
    bridge.start()
    time.sleep(0.2)
    began = time.monotonic()
    bridge.stop()
    service.stop()
    assert time.monotonic() - began < 1


def test_backoff_grows_to_its_limit_and_differs() -> None:
    first, longest = BACKOFF_S
    assert all(first <= backoff_s(1) <= 2 * first for _ in range(100))
    assert all(longest / 2 <= backoff_s(10_000) <= longest for _ in range(100))
    assert len({backoff_s(9) for _ in range(10)}) > 1


def test_nodelay_is_set_on_our_end(make_device: MakeDevice) -> None:
    ours = make_device().bridge._connection.socket()
    assert ours is not None
    assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_nodelay_is_set_on_the_brokers_end(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    ours = make_device().bridge._connection.socket()
    assert ours is not None
    assert broker.pid is not None
    with _socket_of(broker.pid, peer=ours.getsockname()) as theirs:
        assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def _socket_of(pid: int, peer: tuple[str, int]) -> socket.socket:
    """A child's socket that is connected to ``peer``, duplicated into this process."""
    pidfd_getfd = 438  # the system call's number on every architecture
    process = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not str(entry.readlink()).startswith("socket:"):
                continue
            copy = ctypes.CDLL(None, use_errno=True).syscall(pidfd_getfd, process, int(entry.name), 0)
            if copy < 0 and ctypes.get_errno() == errno.EPERM:
                pytest.skip("this sandbox forbids to look at a child's sockets")
            assert copy >= 0, os.strerror(ctypes.get_errno())
            candidate = socket.socket(fileno=copy)
            with suppress(OSError):
                if candidate.getpeername() == peer:
                    return candidate
            candidate.close()
    finally:
        os.close(process)
    raise AssertionError("the broker has no such connection")
