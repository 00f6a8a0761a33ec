"""Home Assistant: its discovery message by its documented schema, and what its entities do over a real broker."""

from __future__ import annotations

import json
import re
from typing import Any

import jinja2
import pytest

from edge.mqtt.homeassistant import MAX_STATE_CHARS, discovery
from edge.mqtt.messages import Done
from edge.mqtt.topics import Layout
from edge.settings.mqtt import DISCOVERY_OFF, MqttSettings
from tests.edge.mqtt.client import Client
from tests.edge.mqtt.conftest import Device, MakeDevice
from tests.fakes import MODEL_NAME, FakeEngine

# From https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload and the pages of the three platforms:
# a key that a platform does not know is an error at the top, and without effect in a component.
TOP = {"device": True, "origin": True, "components": True}
DEVICE = {"identifiers", "name", "manufacturer", "model", "sw_version"}
COMMON = {
    "platform", "unique_id", "name", "entity_category", "availability_topic", "payload_available",
    "payload_not_available", "qos", "json_attributes_topic", "json_attributes_template",
}  # fmt: skip
PLATFORMS = {
    "sensor": {"state_topic", "value_template", "unit_of_measurement", "device_class", "state_class"},
    "binary_sensor": {"state_topic", "payload_on", "payload_off", "device_class"},
    "text": {"command_topic", "command_template", "max"},
}
REQUIRED = {"sensor": "state_topic", "binary_sensor": "state_topic", "text": "command_topic"}


def config(**settings: Any) -> dict[str, Any]:
    """The announcement of a device."""
    chosen = MqttSettings(device="edge-1", **{"home_assistant": True, **settings})
    message = discovery(chosen, Layout(chosen.root, chosen.device), MODEL_NAME, has_temperature=True)
    assert message is not None
    return dict(json.loads(message.payload))


def render(template: str, payload: bytes | str) -> str:
    """A template as Home Assistant renders it; ``payload`` is a message, or the value of a command."""
    environment = jinja2.Environment()
    environment.filters["to_json"] = json.dumps
    variables: dict[str, Any] = {"value": payload}
    if isinstance(payload, bytes):
        variables["value_json"] = json.loads(payload)
    return environment.from_string(template).render(variables)


def test_the_announcement_follows_the_documented_schema() -> None:
    announced = config()
    assert set(announced) == set(TOP)
    assert set(announced["device"]) == DEVICE
    assert announced["device"]["identifiers"]
    assert announced["origin"]["name"] == "qwedge"
    for key, part in announced["components"].items():
        assert re.fullmatch(r"[a-zA-Z0-9_-]+", key)
        assert set(part) <= COMMON | PLATFORMS[part["platform"]], key
        assert part[REQUIRED[part["platform"]]]
        jinja2.Environment().parse(part.get("value_template", ""))
    assert len({part["unique_id"] for part in announced["components"].values()}) == len(announced["components"])


def test_what_needs_the_device_is_gone_with_it_and_its_status_is_told_all_the_same() -> None:
    parts = config()["components"]
    assert {key for key, part in parts.items() if "availability_topic" not in part} == {"status"}
    assert {part["availability_topic"] for key, part in parts.items() if key != "status"} == {
        "qwedge/v1/dev/edge-1/status"
    }


def test_topics_fit_every_name() -> None:
    chosen = MqttSettings(device="a.b", client_id="my client", home_assistant="ha/discovery")
    message = discovery(chosen, Layout("plant/7", "a.b"), MODEL_NAME, has_temperature=False)
    assert message is not None
    assert re.fullmatch(r"ha/discovery/device/[a-zA-Z0-9_-]+/config", message.topic)
    parts = json.loads(message.payload)["components"]
    assert "temperature" not in parts
    assert parts["prompt"]["command_topic"] == "plant/7/v1/dev/a.b/prompt"


def test_without_the_setting_nothing_is_published() -> None:
    chosen = MqttSettings(device="edge-1")
    assert discovery(chosen, Layout("qwedge", "edge-1"), MODEL_NAME, has_temperature=False) is None


@pytest.mark.parametrize("value", ['say "hi"', "{{ 7 * 7 }}", "a\nb", "ünï", '{"v": 1}'])
def test_whatever_is_typed_becomes_one_user_message(value: str) -> None:
    request = json.loads(render(config()["components"]["prompt"]["command_template"], value))
    assert request["body"]["messages"] == [{"role": "user", "content": value}]


# --- over a broker --------------------------------------------------------------------------------------------------

on_broker = pytest.mark.broker


def announced(client: Client, device: Device) -> Any:
    topic = f"homeassistant/device/qwedge-{device.name}/config"
    return client.wait(lambda: next((m for m in reversed(client.received) if m.topic == topic), None))


def the_answer(client: Client, parts: Any) -> Any:
    topic = parts["answer"]["state_topic"]
    assert parts["answer"]["json_attributes_topic"] == topic
    return client.wait(lambda: next((m for m in client.received if m.topic == topic), None))


@on_broker
def test_the_announcement_is_retained_until_it_is_taken_back(make_device: MakeDevice) -> None:
    device = make_device(home_assistant=True)
    announced(device.client(extra=("homeassistant/device/#",)), device)  # it may come while this client subscribes
    late = device.client(extra=("homeassistant/device/#",))
    message = announced(late, device)
    assert message.retain
    assert json.loads(message.payload)["device"]["model"] == MODEL_NAME
    device.bridge.stop()
    assert announced(device.client(extra=("homeassistant/device/#",)), device).retain

    make_device(device=device.name, home_assistant=False)
    late.wait(lambda: late.received[-1].payload == b"")
    after = device.client(extra=("homeassistant/device/#", "test/marker"))
    after.publish("test/marker", b"")
    after.wait(lambda: [m for m in after.received if m.topic == "test/marker"])
    assert not [m for m in after.received if device.name in m.topic]


@on_broker
@pytest.mark.parametrize("length", [5, 300])
def test_a_prompt_from_its_text_entity_becomes_the_answers_state(make_device: MakeDevice, length: int) -> None:
    device = make_device(FakeEngine(reply=lambda _prompt: "x" * length), home_assistant=True)
    client = device.client(extra=("homeassistant/device/#", "qwedge/v1/res/home-assistant/#"))
    parts = json.loads(announced(client, device).payload)["components"]
    command = render(parts["prompt"]["command_template"], 'Say "x"')
    client.publish(parts["prompt"]["command_topic"], command.encode())
    outcome = the_answer(client, parts)
    assert render(parts["answer"]["value_template"], outcome.payload) == "x" * min(length, MAX_STATE_CHARS)
    attributes = json.loads(render(parts["answer"]["json_attributes_template"], outcome.payload))
    assert attributes == {"text": "x" * length, "status": 200}


@on_broker
def test_a_prompt_that_fails_shows_why(make_device: MakeDevice) -> None:
    device = make_device(home_assistant=True)
    client = device.client(extra=("homeassistant/device/#", "qwedge/v1/res/home-assistant/#"))
    parts = json.loads(announced(client, device).payload)["components"]
    client.publish(parts["prompt"]["command_topic"], b'{"broken"')
    outcome = the_answer(client, parts)
    assert "JSON" in render(parts["answer"]["value_template"], outcome.payload)


@on_broker
def test_the_same_prompt_twice_is_two_requests(make_device: MakeDevice) -> None:
    device = make_device(home_assistant=True)
    client = device.client(extra=("qwedge/v1/res/home-assistant/#",))
    for _ in range(2):
        client.publish(f"{client.device}/prompt", b"Hi")
    topic = f"qwedge/v1/res/home-assistant/{device.name}/answer"
    client.wait(lambda: len([m for m in client.received if m.topic == topic]) == 2)
    ids = [Done.model_validate_json(m.payload).id for m in client.received if m.topic == topic]
    assert len(set(ids)) == 2


@on_broker
def test_each_device_has_an_answer_of_its_own(make_device: MakeDevice) -> None:
    one, other = make_device(home_assistant=True), make_device(home_assistant=True)
    client = one.client(extra=("homeassistant/device/#", "qwedge/v1/res/home-assistant/#"))
    parts = [json.loads(announced(client, device).payload)["components"] for device in (one, other)]
    client.publish(parts[0]["prompt"]["command_topic"], b"Hi")
    the_answer(client, parts[0])
    assert not [m for m in client.received if m.topic == parts[1]["answer"]["state_topic"]]


@on_broker
def test_figures_come_from_the_load(make_device: MakeDevice) -> None:
    device = make_device(home_assistant=True)
    client = device.client(extra=("homeassistant/device/#", f"qwedge/v1/dev/{device.name}/load"))
    parts = json.loads(announced(client, device).payload)["components"]
    load = client.wait(lambda: next((m for m in client.received if m.topic.endswith("/load")), None))
    assert parts["queue"]["state_topic"] == load.topic
    assert render(parts["queue"]["value_template"], load.payload) == "0"
    assert render(parts["tokens_per_s"]["value_template"], load.payload) == "0.0"


@on_broker
def test_without_the_setting_its_topics_do_nothing(make_device: MakeDevice) -> None:
    device = make_device()
    client = device.client(extra=("homeassistant/#", "qwedge/v1/res/home-assistant/#"))
    client.publish(f"{client.device}/prompt", b"Hi")
    client.send("1", b"honest")
    client.done("1")
    assert not [m for m in client.received if device.name in m.topic and m.topic.startswith("homeassistant")]
    assert device.bridge.stats().num_requests == 1
    assert MqttSettings(home_assistant=False).home_assistant == DISCOVERY_OFF
