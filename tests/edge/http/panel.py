"""A device with MQTT for tests of its view: a real broker, a bridge, and an HTTP server over one service."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from edge.commands.mqtt_panel import BridgePanel
from edge.http.routes.device import DeviceSources
from edge.log_buffer import LogBuffer
from edge.mqtt import EmbeddedBroker, MqttBridge
from edge.settings.mqtt import MqttSettings
from edge.settings.server import ServerSettings
from tests.fakes import FakeEngine, make_service
from tests.serving import Served, serving, wait_for


@contextmanager
def device_with_mqtt(engine: FakeEngine, **sources: Any) -> Iterator[Served]:
    """Serve over HTTP and a broker of its own until the block ends; ``sources`` are more of the device view's."""
    service = make_service(engine)
    settings = MqttSettings(device="edge-7", keepalive_s=5)
    with EmbeddedBroker(0) as broker, _logs() as logs:
        bridge = MqttBridge(service, settings, broker.address)
        app = {"device": DeviceSources(logs, BridgePanel(bridge, settings, broker.address), **sources)}
        with serving(service, ServerSettings(port=0), **app) as (host, port):
            bridge.start()
            try:
                wait_for(lambda: bridge.connected)
                url = f"http://{host}:{port}"
                with httpx.Client(base_url=url, timeout=60) as client:
                    yield Served(url, port, engine, service, client)
            finally:
                engine.gate.set()
                service.stop()
                bridge.stop()


@contextmanager
def _logs() -> Iterator[LogBuffer]:
    logs, root = LogBuffer(), logging.getLogger()
    level = root.level
    root.addHandler(logs)
    root.setLevel(logging.INFO)
    try:
        yield logs
    finally:
        root.removeHandler(logs)
        root.setLevel(level)
