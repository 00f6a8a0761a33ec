"""Tells Home Assistant about this device: one retained discovery message for all its entities [1].

Home Assistant reads our retained ``status`` and ``load``. Its prompts come on one fixed topic, as it can name no
request id, and run as requests of the client ``home-assistant``; their outcomes are the sensor of the last answer.

[1] https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from edge import __version__
from edge.mqtt.packets import Incoming, Outgoing
from edge.mqtt.topics import Layout, RequestId, answers_filter
from edge.settings.mqtt import DISCOVERY_OFF, DISCOVERY_PREFIX, MqttSettings

CLIENT: Final = "home-assistant"
"""Client name of prompts from Home Assistant."""
MAX_STATE_CHARS: Final = 255
"""Longest state of an entity; Home Assistant takes no longer one."""
_TEXT: Final = (
    "(value_json.body.choices[0].message.content if value_json.status == 200 else value_json.body.error.message)"
)
_COMMAND: Final = "{{ {'v': 1, 'body': {'messages': [{'role': 'user', 'content': value}]}} | to_json }}"


def discovery(
    settings: MqttSettings,
    layout: Layout,
    model: str,
    *,
    has_temperature: bool,
    takes_commands: bool = False,
    bundles: Sequence[str] | None = None,
) -> Outgoing | None:
    """What to publish when a connection is made: the announcement, its withdrawal, or nothing.

    Args:
        settings: say which of them.
        layout: our topics.
        model: name of what is served.
        has_temperature: whether ``load`` holds one.
        takes_commands: whether the device can be managed.
        bundles: what it can be switched to; None where there is no choice.
    """
    if settings.home_assistant is None:
        return None
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{settings.client_id}-{settings.device}")
    off = settings.home_assistant == DISCOVERY_OFF
    topic = f"{DISCOVERY_PREFIX if off else settings.home_assistant}/device/{name}/config"
    parts = _parts(layout, has_temperature) | (_commands(layout, bundles) if takes_commands else {})
    payload = b"" if off else json.dumps(_config(name, layout, model, parts)).encode()
    return Outgoing(topic, payload, qos=1, retain=True)


def subscriptions(settings: MqttSettings, layout: Layout) -> tuple[str, ...]:
    """What to listen to for Home Assistant."""
    return () if settings.home_assistant in {None, DISCOVERY_OFF} else (layout.prompt,)


def as_request(message: Incoming, layout: Layout) -> Incoming:
    """A prompt of Home Assistant's as a request under an id of its own, whose outcome goes to the Answer's topic."""
    topic = layout.request(RequestId(CLIENT, secrets.token_hex(8)))
    return replace(message, topic=topic, response_topic=_answer_topic(layout))


def _answer_topic(layout: Layout) -> str:
    return f"{answers_filter(layout.root, CLIENT).removesuffix('#')}{layout.device}/answer"


def _config(name: str, layout: Layout, model: str, parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The announcement; ``parts`` are the entities that exist only while the device is online."""
    components = {
        "status": {
            "platform": "binary_sensor",
            "name": "Status",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
            "state_topic": layout.status,
            "payload_on": "online",
            "payload_off": "offline",
        },
        **{key: {**part, **_available(layout)} for key, part in parts.items()},
    }
    return {
        "device": {
            "identifiers": [name],
            "name": layout.device,
            "manufacturer": "qwedge",
            "model": model,
            "sw_version": __version__,
        },
        "origin": {"name": "qwedge", "sw_version": __version__},
        "components": {key: {**part, "unique_id": f"{name}_{key}"} for key, part in components.items()},
    }


def _commands(layout: Layout, bundles: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """The entities that change the device."""
    parts: dict[str, dict[str, Any]] = {
        "restart": {
            "platform": "button",
            "name": "Restart",
            "device_class": "restart",
            "entity_category": "config",
            "command_topic": layout.command("restart", CLIENT),
            "payload_press": json.dumps({"v": 1, "status": "init"}),
            "qos": 1,
        }
    }
    if bundles:
        parts["bundle"] = {
            "platform": "select",
            "name": "Model",
            "entity_category": "config",
            "command_topic": layout.command("switch", CLIENT),
            "command_template": "{{ {'v': 1, 'status': 'init', 'name': value} | to_json }}",
            "state_topic": layout.info,
            "value_template": "{{ value_json.bundle }}",
            "options": list(bundles),
            "qos": 1,
        }
    return parts


def _parts(layout: Layout, has_temperature: bool) -> dict[str, dict[str, Any]]:
    """The entities that show the device, and take questions."""
    answer = _answer_topic(layout)
    parts = {
        "tokens_per_s": _figure(layout, "Speed", "tokens_per_s", unit_of_measurement="tokens/s"),
        "queue": _figure(layout, "Waiting requests", "queue", unit_of_measurement="requests"),
        "busy": _figure(layout, "Running requests", "busy", unit_of_measurement="requests"),
        "prompt": {
            "platform": "text",
            "name": "Prompt",
            "command_topic": layout.prompt,
            "command_template": _COMMAND,
            "max": MAX_STATE_CHARS,
            "qos": 1,
        },
        "answer": {
            "platform": "sensor",
            "name": "Answer",
            "state_topic": answer,
            "value_template": f"{{{{ {_TEXT}[:{MAX_STATE_CHARS}] }}}}",
            "json_attributes_topic": answer,
            "json_attributes_template": f"{{{{ {{'text': {_TEXT}, 'status': value_json.status}} | to_json }}}}",
            "qos": 1,
        },
    }
    if has_temperature:
        options = {"unit_of_measurement": "°C", "device_class": "temperature", "entity_category": "diagnostic"}
        parts["temperature"] = _figure(layout, "Temperature", "temperature_c", **options)
    return parts


def _figure(layout: Layout, name: str, field: str, **options: str) -> dict[str, Any]:
    """A sensor that shows a field of ``load``."""
    template = f"{{{{ value_json.{field} }}}}"
    base = {"platform": "sensor", "name": name, "state_class": "measurement", "state_topic": layout.load}
    return {**base, "value_template": template, **options}


def _available(layout: Layout) -> dict[str, str]:
    return {
        "availability_topic": layout.status,
        "payload_available": "online",
        "payload_not_available": "offline",
    }
