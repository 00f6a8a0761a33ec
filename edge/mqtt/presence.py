"""What the device says about itself in retained messages: status, info and load."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from edge import __version__
from edge.management import Management
from edge.mqtt.connection import Connection
from edge.mqtt.messages import MAX_PAYLOAD_BYTES, Info, Limits, Load, ModelInfo, Status, Versions
from edge.mqtt.packets import Outgoing
from edge.mqtt.topics import PROTOCOL_VERSION, Layout
from edge.service import Service

LOAD_INTERVAL_S: Final = 1.0
"""Shortest time between two load messages."""
TEMPERATURE_STEP_C: Final = 2.0
"""Least change of the temperature that is told."""


def status_message(layout: Layout, status: Status) -> Outgoing:
    """The retained status; ``offline`` is also the last will."""
    return Outgoing(layout.status, status.encode(), qos=1, retain=True, content_type="text/plain")


def make_info(
    service: Service,
    device: str,
    mqtt_version: str,
    management: Management | None = None,
    *,
    problem: str | None = None,
) -> Info:
    """What the device is; with ``management``, what it can become too; with a ``problem``, why it does less."""
    manifest, stats = service.model.manifest, service.stats()
    store = management if management is not None and management.has_store else None
    return Info(
        device=device,
        bundle=None if store is None else store.served,
        bundles=None if store is None else tuple(each.name for each in store.bundles()),
        models=tuple(
            ModelInfo(id=name, model_type=manifest.model_type, context_length=service.model.context_length)
            for name in service.model.names()
        ),
        limits=Limits(slots=stats.slots, max_queue=stats.max_queue, max_payload_bytes=MAX_PAYLOAD_BYTES),
        versions=Versions(qwedge=__version__, protocol=PROTOCOL_VERSION, mqtt=mqtt_version),
        problem=problem,
    )


def make_load(service: Service, tokens_per_s: float, temperature_c: float | None = None) -> Load:
    """How busy the device is."""
    stats = service.stats()
    return Load(
        slots=stats.slots,
        busy=stats.num_running,
        queue=stats.num_waiting,
        accepting=stats.accepting,
        tokens_per_s=tokens_per_s,
        temperature_c=temperature_c,
        speed=stats.throttle.speed if stats.throttle.level else None,
        slowed_by=stats.throttle.reason,
    )


class LoadReporter:
    """Publishes the load when it changed, at most once in :data:`LOAD_INTERVAL_S`.

    Args:
        connection: where to.
        topic: the load topic.
        measure: gives the load now.
    """

    def __init__(self, connection: Connection, topic: str, measure: Callable[[], Load]) -> None:
        self._connection = connection
        self._topic = topic
        self._measure = measure
        self._published: Load | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="mqtt-load", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def refresh(self) -> None:
        """Publish again even where nothing changed: the broker may have forgotten."""
        self._published = None

    def _run(self) -> None:
        while not self._stopping.wait(LOAD_INTERVAL_S):
            load = self._measure()
            if load != self._published and self._connection.ready:
                self._connection.publish(Outgoing(self._topic, load.encode(), qos=0, retain=True))
                self._published = load
