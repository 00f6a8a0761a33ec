"""A requester for tests: an ordinary paho client that checks every message it gets.

It is held against the product's classes and against the schemas in docs/schemas.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge.mqtt.messages import Accepted, Command, Done, Info, Load, Message, Queued, RuleFailure, Started, Tokens
from edge.settings.mqtt import BrokerAddress
from tests.json_schema import validate

TIMEOUT_S = 60.0
PROTOCOLS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}
EVENTS: dict[str, type[Message]] = {"accepted": Accepted, "queued": Queued, "started": Started}
KINDS: dict[str, type[Message]] = {"tok": Tokens, "done": Done, "info": Info, "load": Load}
SCHEMAS = Path(__file__).parents[3] / "docs" / "schemas" / "mqtt"


@dataclass(frozen=True)
class Received:
    """A message, checked where it is JSON of ours."""

    topic: str
    payload: bytes
    retain: bool
    value: Any
    correlation: bytes | None


class Client:
    """Connected between ``with`` and its end; hears ``res/{name}/#`` and ``extra``."""

    def __init__(
        self, address: BrokerAddress, name: str, device: str, *, protocol: str = "5", extra: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.device = f"qwedge/v1/dev/{device}"
        self.branch = f"qwedge/v1/res/{name}"
        self.received: list[Received] = []
        self._changed = threading.Condition()
        self._protocol = PROTOCOLS[protocol]
        self._filters = [f"{self.branch}/#", *extra]
        self._subscribed = threading.Event()
        self._problem: Exception | None = None
        self._paho = paho.Client(CallbackAPIVersion.VERSION2, f"test-{name}", protocol=self._protocol)
        self._paho.reconnect_delay_set(1, 1)
        self._paho.on_connect = self._connected
        self._paho.on_subscribe = lambda *_: self._subscribed.set()
        self._paho.on_message = self._on_message
        self._paho.connect_async(address.host, address.port, 10)

    def __enter__(self) -> Self:
        self._paho.loop_start()
        assert self._subscribed.wait(TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._paho.disconnect()
        self._paho.loop_stop()
        if self._problem is not None and error is None:
            raise self._problem

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, **properties: Any) -> None:
        """Publish at QoS 1 and wait for the broker's word."""
        extra = None
        if properties:
            extra = Properties(PacketTypes.PUBLISH)
            for name, value in properties.items():
                setattr(extra, name, value)
        self._paho.publish(topic, payload, 1, retain, extra).wait_for_publish(TIMEOUT_S)

    def send(self, request_id: str, request: dict[str, Any] | bytes, **options: Any) -> None:
        """Publish a request."""
        payload = request if isinstance(request, bytes) else json.dumps(request).encode()
        self.publish(f"{self.device}/req/{self.name}/{request_id}", payload, **options)

    def cancel(self, request_id: str) -> None:
        """Publish a cancel."""
        self.publish(f"{self.device}/cancel/{self.name}/{request_id}", b"")

    def of(self, request_id: str, kind: str) -> list[Any]:
        """What has arrived on one of a request's topics."""
        topic = f"{self.branch}/{request_id}/{kind}"
        with self._changed:
            return [message.value for message in self.received if message.topic == topic]

    def wait(self, predicate: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
        """Wait until something that arrived makes the predicate true."""
        with self._changed:
            result = self._changed.wait_for(predicate, timeout_s)
        assert result, [(message.topic, message.payload[:200]) for message in self.received]
        return result

    def done(self, request_id: str, number: int = 1) -> Done:
        """Wait for a request's outcome, or its n-th."""
        self.wait(lambda: len(self.of(request_id, "done")) >= number)
        outcome = self.of(request_id, "done")[number - 1]
        assert isinstance(outcome, Done)
        return outcome

    def event(self, request_id: str, name: str) -> Any:
        """Wait for a request's event."""
        return self.wait(lambda: next((e for e in self.of(request_id, "evt") if e.event == name), None))

    def _connected(self, client: paho.Client, *_: Any) -> None:
        client.subscribe([(topic, 1) for topic in self._filters])

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        payload = bytes(message.payload)
        value: Any = payload
        try:
            value = check(message.topic, payload)
        except Exception as error:  # noqa: BLE001 - reported by the test, not by paho's thread
            self._problem = error
        correlation = getattr(message.properties, "CorrelationData", None)
        with self._changed:
            self.received.append(Received(message.topic, payload, message.retain, value, correlation))
            self._changed.notify_all()


def check(topic: str, payload: bytes) -> Any:
    """The message as its class, which follows its schema; the bytes where it is none of ours."""
    cls = _class_of(topic, payload)
    if cls is None:
        return payload
    validate(json.loads(payload), _schema(cls))
    return cls.model_validate_json(payload)


def schema_of(cls: type[Message]) -> Path:
    """The file with a message's schema."""
    return SCHEMAS / f"{re.sub(r'(?<=[a-z])(?=[A-Z])', '-', cls.__name__).lower()}.json"


@cache
def _schema(cls: type[Message]) -> Any:
    return json.loads(schema_of(cls).read_text(encoding="utf-8"))


def _class_of(topic: str, payload: bytes) -> type[Message] | None:
    levels = topic.split("/")
    if levels[-3:-2] == ["rule"]:
        return RuleFailure
    if levels[-3:-2] == ["cmd"]:
        return Command if payload else None
    return EVENTS[json.loads(payload)["event"]] if levels[-1] == "evt" else KINDS.get(levels[-1])


def chat(content: str, **envelope: Any) -> dict[str, Any]:
    """A request with one user message."""
    return {"v": 1, "body": {"messages": [{"role": "user", "content": content}]}, **envelope}


def text_of(done: Done) -> str:
    """The answer's text."""
    return str(done.body["choices"][0]["message"]["content"])
