"""The MQTT front end: requests and answers over a broker (docs/mqtt-protocol.md).

``qwedge serve`` uses two classes. Imports and constructors have no effects::

    address = settings.mqtt.address                       # an external broker, or None
    if settings.mqtt.broker == "embedded":
        broker = make_broker(settings.mqtt, folder)       # our own mosquitto (broker_setup); also a context manager
        broker.start()                                    # UnavailableError with a hint: no mosquitto, port taken
        address = broker.address
    journal = Journal(journal_folder(settings.mqtt, os.environ))
    bridge = MqttBridge(service, settings.mqtt, address, journal)  # ConfigError: unreadable password file
    bridge.start()                                        # returns at once; a broker that is away is retried forever
    ...
    bridge.connected, bridge.stats()                      # for /health and /metrics
    ...
    service.stop(drain_s)                                 # running requests end, for every front end
    bridge.stop()                                         # sends what is left, says offline, disconnects
    broker.stop()

The way of a message: ``connection`` (the network thread) puts it into a bounded inbox; ``intake`` (a thread) checks,
tokenizes and submits it; the service's events pass through ``answers`` (a thread), which publishes. The journal (a
thread) has requests before they are acknowledged and outcomes before they are published; ``resume`` (a thread) runs
again what a crash left unanswered.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge.mqtt.bridge import BridgeStats, MqttBridge
    from edge.mqtt.broker import EmbeddedBroker

__all__ = ["BridgeStats", "EmbeddedBroker", "MqttBridge"]


def __getattr__(name: str) -> Any:
    # On demand: programs that only ask use `connection` and `topics`, without the engine behind the bridge.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "edge.mqtt.broker" if name == "EmbeddedBroker" else "edge.mqtt.bridge"
    return getattr(import_module(home), name)
