"""Devices that are asked over MQTT and over HTTP, by the client that programs embed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from edge.client import AsyncClient, Client
from edge.service import Service
from edge.settings.server import ServerSettings
from tests.edge.mqtt.conftest import MakeDevice, _mosquitto_is_there, broker, make_device
from tests.fakes import FakeEngine
from tests.serving import served

__all__ = ["_mosquitto_is_there", "broker", "make_device"]


@dataclass(frozen=True)
class Way:
    """Something that answers, and how to reach it."""

    engine: FakeEngine
    service: Service
    url: str
    target: dict[str, Any]

    def client(self, **options: Any) -> Client:
        return Client(self.url, **{"timeout_s": 20, **self.target, **options})

    def async_client(self, **options: Any) -> AsyncClient:
        return AsyncClient(self.url, **{"timeout_s": 20, **self.target, **options})


MakeWay = Callable[..., Way]


@pytest.fixture(params=["mqtt", "http"])
def make_way(request: pytest.FixtureRequest) -> Iterator[MakeWay]:
    """Start something that answers, over the transport of the test."""
    make_device: MakeDevice = request.getfixturevalue("make_device")
    with ExitStack() as stack:

        def make(engine: FakeEngine | None = None, *, max_queue: int = 8) -> Way:
            engine = engine or FakeEngine()
            if request.param == "http":
                http = stack.enter_context(served(engine, max_queue=max_queue, settings=ServerSettings(port=0)))
                return Way(engine, http.service, http.url, {})
            device = make_device(engine, max_queue=max_queue)
            return Way(engine, device.service, mqtt_url(request.getfixturevalue("broker")), {"device": device.name})

        yield make


def mqtt_url(broker: Any) -> str:
    return f"mqtt://{broker.address.host}:{broker.address.port}"
