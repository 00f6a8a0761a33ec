"""Management over MQTT: retained commands that go through states, over a real broker with real bundles."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from edge.mqtt import EmbeddedBroker, MqttBridge
from edge.mqtt.messages import Command, Info
from edge.settings.mqtt import MqttSettings
from tests.edge.managed import Device, export_two, managed
from tests.edge.mqtt.client import Client
from tests.edge.mqtt.conftest import wait_until

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_two(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def device(exported: Path, tmp_path: Path) -> Iterator[Device]:
    with managed(exported, tmp_path) as device:
        yield device


class Operator:
    """A client that gives commands to a device, and the device's bridge."""

    def __init__(self, device: Device, broker: EmbeddedBroker, **settings: Any) -> None:
        self.name = f"managed-{next(_numbers)}"
        self.base = f"qwedge/v1/dev/{self.name}"
        self._broker = broker
        chosen = MqttSettings(device=self.name, keepalive_s=5, **{"management": "on", **settings})
        self.bridge = MqttBridge(device.service, chosen, broker.address, management=device.management)

    def __enter__(self) -> Self:
        self.bridge.start()
        wait_until(lambda: self.bridge.connected)
        extra = (f"{self.base}/cmd/#", f"{self.base}/info", f"homeassistant/device/qwedge-{self.name}/config")
        self.client = Client(self._broker.address, f"operator-{self.name}", self.name, extra=extra)
        self.client.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.__exit__(None, None, None)
        self.bridge.stop()

    def order(self, kind: str, name: str | None = None, command_id: str = "1", **extra: Any) -> str:
        topic = f"{self.base}/cmd/{kind}/{command_id}"
        body = {"v": 1, "status": "init", **({} if name is None else {"name": name}), **extra}
        self.client.publish(topic, json.dumps(body).encode(), retain=True)
        return topic

    def states(self, topic: str) -> list[Command]:
        found = [message.value for message in self.client.received if message.topic == topic]
        return [value for value in found if isinstance(value, Command)]

    def end(self, topic: str) -> Command:
        def last() -> Command | None:
            states = self.states(topic)
            return states[-1] if states and states[-1].status in {"successful", "failed"} else None

        result = self.client.wait(last)
        assert isinstance(result, Command)
        return result


def test_a_switch_is_told_from_its_order_to_its_end(device: Device, broker: EmbeddedBroker) -> None:
    with Operator(device, broker) as operator:
        topic = operator.order("switch", "second")
        assert operator.end(topic).status == "successful"
        states = operator.states(topic)
        assert [state.status for state in states][:2] == ["init", "executing"]
        assert {"verifying", "loading", "testing"} <= {state.step for state in states}
        assert len(states) < 12, "progress is told once a second"
        bundles = {installed.model: installed.name for installed in device.store.list()}
        infos = [message.value for message in operator.client.received if message.topic.endswith("/info")]
        operator.client.wait(lambda: len([m for m in operator.client.received if m.topic.endswith("/info")]) >= 2)
        infos = [message.value for message in operator.client.received if message.topic.endswith("/info")]
        assert all(isinstance(info, Info) for info in infos)
        assert [info.bundle for info in infos] == [bundles["first"], bundles["second"]]
        assert set(infos[0].bundles) == set(bundles.values())
        assert [model.id for model in infos[-1].models] == ["second"]
        operator.client.send("7", {"v": 1, "body": {"prompt": "?", "max_tokens": 2}})
        assert operator.client.done("7").body["model"] == "second"


def test_the_outcome_waits_for_a_client_that_was_away(device: Device, broker: EmbeddedBroker) -> None:
    with Operator(device, broker) as operator:
        topic = operator.order("verify", "second")
        operator.end(topic)
        with Client(broker.address, "late", operator.name, extra=(topic,)) as late:
            found = late.wait(lambda: [message for message in late.received if message.topic == topic])
            assert found[0].retain
            assert found[0].value.status == "successful"


def test_an_order_waits_for_a_device_that_is_away(device: Device, broker: EmbeddedBroker) -> None:
    operator = Operator(device, broker)
    with Client(broker.address, "early", operator.name) as early:
        early.publish(f"{operator.base}/cmd/verify/9", b'{"v":1,"status":"init","name":"first"}', retain=True)
    with operator:
        assert operator.end(f"{operator.base}/cmd/verify/9").status == "successful"


@pytest.mark.parametrize(
    ("kind", "payload", "message"),
    [
        ("switch", b'{"v":1,"status":"init","name":"third"}', "there is no bundle third"),
        ("switch", b'{"v":1,"status":"init"}', "no bundle is named"),
        ("dance", b'{"v":1,"status":"init"}', "there is no command 'dance'"),
        ("verify", b'{"v":1,"status":"init","nam":"first"}', "nam: is not known"),
        ("verify", b"{", "not valid JSON"),
        ("verify", b'{"v":1,"status":"begin"}', "status: must be 'init'"),
        ("rollback", b'{"v":1,"status":"init"}', "there is no bundle to go back to"),
    ],
)
def test_an_order_that_cannot_be_carried_out_fails_with_a_reason(
    device: Device, broker: EmbeddedBroker, kind: str, payload: bytes, message: str
) -> None:
    with Operator(device, broker) as operator:
        topic = f"{operator.base}/cmd/{kind}/1"
        operator.client.publish(topic, payload)
        end = operator.end(topic)
        operator.client._problem = None  # what was sent may be no message of the protocol
        assert end.status == "failed"
        assert end.error is not None
        assert message in end.error["message"]
        assert end.error["hint"]
    assert device.served == "first"


def test_a_second_order_meanwhile_is_refused(device: Device, broker: EmbeddedBroker) -> None:
    with Operator(device, broker) as operator:
        topics = [operator.order("verify", "first", command_id=str(number)) for number in range(6)]
        ends = [operator.end(topic) for topic in topics]
        assert ends[0].status == "successful"
        refused = [end for end in ends if end.status == "failed"]
        assert all(end.error is not None and "is running" in end.error["message"] for end in refused)


@pytest.mark.parametrize(
    ("kind", "name", "status"),
    [("restart", None, "successful"), ("reload", None, "successful"), ("verify", "first", "failed"),
     ("switch", "first", "successful"), ("switch", "second", "failed")],
)  # fmt: skip
def test_what_a_restart_interrupted_is_brought_to_an_end(
    device: Device, broker: EmbeddedBroker, kind: str, name: str | None, status: str
) -> None:
    full = None if name is None else device.store.find(name).name
    operator = Operator(device, broker)
    topic = f"{operator.base}/cmd/{kind}/1"
    with Client(broker.address, "before", operator.name) as before:
        left = Command(status="executing", name=full, step="loading")
        before.publish(topic, left.encode(), retain=True)
    with operator:
        assert operator.end(topic).status == status


def test_a_restart_is_asked_for_and_stays_open_until_the_process_is_back(
    device: Device, broker: EmbeddedBroker
) -> None:
    with Operator(device, broker) as operator:
        topic = operator.order("restart")
        operator.client.wait(lambda: device.restarts == 1 and len(operator.states(topic)) == 2)
        assert [state.status for state in operator.states(topic)] == ["init", "executing"]


def test_a_reload_with_settings_that_are_wrong_changes_nothing(device: Device, broker: EmbeddedBroker) -> None:
    device.settings_problem = "qwedge.toml: [server] port must be smaller"
    with Operator(device, broker) as operator:
        end = operator.end(operator.order("reload"))
        assert end.status == "failed"
        assert end.error is not None
        assert "must be smaller" in end.error["message"]
    assert device.restarts == 0


def test_a_cleared_command_and_foreign_words_are_let_be(device: Device, broker: EmbeddedBroker) -> None:
    with Operator(device, broker) as operator:
        topic = operator.order("verify", "first")
        operator.end(topic)
        operator.client.publish(topic, b"", retain=True)
        operator.client.publish(topic, b'{"v":1,"status":"successful"}')
        operator.end(operator.order("verify", "first", command_id="2"))
        told = [message.payload for message in operator.client.received if message.topic == topic]
        assert told[-2:] == [b"", b'{"v":1,"status":"successful"}']


def test_without_the_setting_there_is_no_management(device: Device, broker: EmbeddedBroker) -> None:
    with Operator(device, broker, management="off", home_assistant=True) as operator:
        topic = operator.order("switch", "second")
        operator.client.send("1", {"v": 1, "body": {"prompt": "?", "max_tokens": 1}})
        operator.client.done("1")
        assert [state.status for state in operator.states(topic)] == ["init"]
        assert {"restart", "bundle"}.isdisjoint(entities(operator))
        info = next(message.value for message in operator.client.received if message.topic.endswith("/info"))
        assert (info.bundle, info.bundles) == (None, None)
    assert device.served == "first"


def test_home_assistant_restarts_the_device_and_chooses_its_model(device: Device, broker: EmbeddedBroker) -> None:
    with Operator(device, broker, home_assistant=True) as operator:
        found = entities(operator)
        options = found["bundle"]["options"]
        assert sorted(options) == sorted(installed.name for installed in device.store.list())
        choice = next(name for name in options if name.startswith("second@"))
        template = found["bundle"]["command_template"]
        assert "'name': value" in template
        order = json.dumps({"v": 1, "status": "init", "name": choice}).encode()
        operator.client.publish(found["bundle"]["command_topic"], order)
        assert operator.end(found["bundle"]["command_topic"]).status == "successful"
        operator.client.publish(found["restart"]["command_topic"], found["restart"]["payload_press"].encode())
        wait_until(lambda: device.restarts == 1)
    assert device.served == "second"


def entities(operator: Operator) -> dict[str, Any]:
    def announced() -> Any:
        return next((m.payload for m in operator.client.received if m.topic.startswith("homeassistant/")), None)

    components: dict[str, Any] = json.loads(operator.client.wait(announced))["components"]
    return components
