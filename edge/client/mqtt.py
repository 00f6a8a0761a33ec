"""Requests over an MQTT broker: to one device, or to the pool of all that serve a model."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from edge.client.devices import Devices
from edge.client.wire import CLOSED, Ended, Event, Lost, Progress, Question, Tell, Text
from edge.errors import ConflictError, OverloadedError, UnavailableError
from edge.mqtt.connection import Connection
from edge.mqtt.packets import Identity, Incoming, Outgoing
from edge.mqtt.topics import (
    PROTOCOL_VERSION,
    Layout,
    RequestId,
    answers_filter,
    devices_filter,
    pool_request,
)
from edge.settings.mqtt import BrokerAddress

log = logging.getLogger(__name__)

KEEPALIVE_S: Final = 10
MAX_ANSWER_BYTES: Final = 16 << 20
STATUS_S: Final = 1.0
"""How long a broker may take to say which devices are there."""
FIRST_WORD_S: Final = (3.0, 30.0)
"""How long a device may take to accept a request before a copy is sent: at first, and at most."""
POOL_FIRST_WORD_S: Final = (1.0, 3.0)
"""The same for a pool. Over MQTT 3.1.1 a request that nobody has room for is lost without a word."""
MAX_DEADLINE_S: Final = 24 * 3600
"""Longest deadline of the protocol."""
MAX_ABANDONED: Final = 256
_LOOK_S: Final = 0.1
_START_A_BROKER = "is a broker running there? `qwedge serve --broker embedded` brings one"
_ASK_FOR_ACCESS = (
    "check the user name, the password and the client's name; `qwedge mqtt add-client NAME` makes an account"
)


class MqttTransport:
    """One client at one broker.

    Args:
        address: the broker.
        identity: MQTT client id and credentials.
        client: our name in topics.
        root: first level(s) of every topic.
        device: who is asked; or None, with
        pool: the model that is asked, on whatever device.
        connect_timeout_s: how long the first connection may take.

    Raises:
        ConfigError: a name cannot stand in a topic.
        RequestError: the client's name cannot.
    """

    def __init__(
        self,
        address: BrokerAddress,
        identity: Identity,
        *,
        client: str,
        root: str,
        device: str | None,
        pool: str | None,
        connect_timeout_s: float,
    ) -> None:
        self.client = RequestId(client, "check").client
        """Our name in topics."""
        self.device = None if device is None else Layout(root, device).device
        """Who is asked; None for a pool."""
        self.pool = pool
        """The model that is asked."""
        self.root = root
        """First level(s) of every topic."""
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        filters = (
            answers_filter(root, self.client),
            devices_filter(root, "status"),
            devices_filter(root, "info"),
        )
        self.connection = Connection(
            address,
            identity,
            keepalive_s=KEEPALIVE_S,
            filters=filters,
            max_payload=MAX_ANSWER_BYTES,
            on_message=self._receive,
            on_ready=self._linked,
            on_unheard=self._unheard,
            keep_session=False,
            retained=filters,
        )
        """The link to the broker."""
        self._lock = threading.Lock()
        self._calls: dict[str, _Call] = {}
        self._started = False
        self._ever_ready = threading.Event()
        self._devices = Devices()
        self._strays: deque[int] = deque(maxlen=MAX_ABANDONED)
        """Messages that reached nobody, before their sender could note their numbers."""
        self._abandoned: deque[str] = deque(maxlen=MAX_ABANDONED)
        """Ids that were cancelled before anybody had accepted them."""

    def connect(self) -> None:
        """See :class:`~edge.client.wire.Transport`; later links are made in the background."""
        with self._lock:
            starting, self._started = not self._started, True
        if starting:
            self.connection.start()
        deadline = time.monotonic() + self._connect_timeout_s
        while not self._ever_ready.wait(_LOOK_S):
            reason = self.connection.reason
            refused = reason.startswith(("refused by the broker", "the broker does not allow"))
            if refused or time.monotonic() >= deadline:
                place = f"{self._address.host}:{self._address.port}"
                hint = _ASK_FOR_ACCESS if refused else _START_A_BROKER
                raise UnavailableError(f"no connection to the MQTT broker {place}: {reason or 'no answer'}", hint=hint)

    def check(self) -> None:
        """See :class:`~edge.client.wire.Transport`: the retained statuses tell who is there."""
        self.connect()
        self._devices.check(self.root, self.device, self.pool, STATUS_S)

    def call(self, question: Question, tell: Tell) -> _Call:
        """See :class:`~edge.client.wire.Transport`."""
        call = _Call(self, question, tell)
        with self._lock:
            if question.id in self._calls:
                raise ConflictError(
                    "a request with this id is running", hint="a new request needs a new id", param="id"
                )
            self._calls[question.id] = call
        return call

    def close(self) -> None:
        """See :class:`~edge.client.wire.Transport`."""
        for call in self._running():
            call.cancel()
            call.tell(CLOSED)
        if self._started:
            self.connection.stop()

    def forget(self, call: _Call) -> None:
        """No longer pass events on to a call."""
        with self._lock:
            self._calls.pop(call.question.id, None)

    def post(self, call: _Call, topic: str, payload: bytes, expiry_s: int | None) -> None:
        """Send a copy of a call's request."""
        number = self.connection.post(Outgoing(topic, payload, qos=1, expiry_s=expiry_s))
        if number is None:
            call.tell(_refusal("too many messages wait for the broker"))
            return
        with self._lock:
            call.number = number
            stray = number in self._strays
            if stray:
                self._strays.remove(number)
        if stray:
            call.unheard()

    def cancel(self, request_id: str, devices: set[str]) -> None:
        """End a request at the devices that accepted it, or at the first one that will."""
        if not devices:
            self._abandoned.append(request_id)
        for device in devices:
            topic = Layout(self.root, device).cancel(RequestId(self.client, request_id))
            self.connection.publish(Outgoing(topic, b"", qos=1))

    # --- the network thread -----------------------------------------------------------------------------------------

    def _linked(self) -> None:
        """What happened while there was no link is unknown: ask after everything that runs."""
        self._ever_ready.set()
        for call in self._running():
            call.tell(Lost("the link to the broker was lost"))

    def _unheard(self, number: int) -> None:
        with self._lock:
            call = next((call for call in self._calls.values() if call.number == number), None)
            if call is None:
                self._strays.append(number)
        if call is not None:
            call.unheard()

    def _receive(self, message: Incoming) -> None:
        message.ack()  # what gets lost here is asked for again
        branch, _, name = message.topic.rpartition("/")
        if message.payload is None:
            log.warning("ignored an oversized message on %s", message.topic)
            return
        try:
            self._read(branch.rpartition("/")[2], name, message.payload)
        except (ValueError, LookupError, TypeError):
            log.warning("ignored a message that is not of the protocol on %s", message.topic)

    def _read(self, owner: str, kind: str, payload: bytes) -> None:
        """Read a message of a device, or of the answer to a request.

        Raises:
            ValueError, LookupError, TypeError: it is not of the protocol.
        """
        match kind:
            case "status":
                self._status(owner, payload.decode())
            case "info":
                self._devices.heard_models(owner, [str(model["id"]) for model in json.loads(payload)["models"]])
            case _:
                self._answer(owner, kind, payload)

    def _answer(self, request_id: str, kind: str, payload: bytes) -> None:
        event = _event(kind, payload)
        with self._lock:
            call = self._calls.get(request_id)
        if call is not None and event is not None:
            call.take(event)
        elif isinstance(event, Progress) and event.device is not None and request_id in self._abandoned:
            self.cancel(request_id, {event.device})

    def _status(self, device: str, status: str) -> None:
        if self._devices.heard_status(device, status):
            for call in self._running():
                call.status_changed(device, online=status == "online")

    def _running(self) -> list[_Call]:
        with self._lock:
            return list(self._calls.values())


class _Call:
    """One request; see :class:`~edge.client.wire.Call`.

    In a pool it belongs to nobody until a device accepts it; from then on that device is asked after it. When the
    device goes offline, or does not answer, the request goes to the pool again.
    """

    def __init__(self, transport: MqttTransport, question: Question, tell: Tell) -> None:
        self.question = question
        self.tell = tell
        self.number: int | None = None
        """Of the newest copy."""
        self._transport = transport
        self._name = RequestId(transport.client, question.id)
        self._device = transport.device
        """Who answers, as far as we know."""
        self._accepted: set[str] = set()
        """Everybody who accepted it."""
        self._asked = False
        """Whether the device was sent a copy and has not said a word since."""
        self.first_word_s = FIRST_WORD_S if transport.pool is None else POOL_FIRST_WORD_S

    def send(self, attempt: int, remaining_s: float | None) -> None:
        if self._asked:
            self._device = self._transport.device
        self._asked = self._device is not None
        request: dict[str, Any] = {
            "v": PROTOCOL_VERSION,
            "body": self.question.body,
            "stream": self.question.stream,
            "attempt": attempt,
        }
        expiry_s = None
        if remaining_s is not None:
            useful_s = min(remaining_s, MAX_DEADLINE_S)
            request["deadline_ms"] = max(1, round(useful_s * 1000))
            expiry_s = math.ceil(useful_s)
        self._transport.post(self, self._topic(), json.dumps(request).encode(), expiry_s)

    def cancel(self) -> None:
        devices = self._accepted | ({self._device} if self._device is not None else set())
        self._transport.cancel(self.question.id, devices)

    def close(self) -> None:
        self._transport.forget(self)

    def unheard(self) -> None:
        """The newest copy reached nobody: in a pool, nobody has room."""
        self._free()
        if self._device is None:
            self.tell(_refusal(f"no device of the pool {self._transport.pool} has room"))
        else:
            self.tell(Lost(f"the device {self._device} is not there"))

    def status_changed(self, device: str, *, online: bool) -> None:
        """A device came or went."""
        if device == self._device:
            if not online:
                self._free()
            self.tell(Lost(f"the device {device} {'came back' if online else 'went offline'}"))

    def take(self, event: Event) -> None:
        """Something about the request arrived."""
        self._asked = False
        if isinstance(event, Progress) and event.device is not None:
            self._device = event.device
            self._accepted.add(event.device)
        elif isinstance(event, Ended) and event.status != 200:
            self._free()
            if event.status == UnavailableError.status and self._device is None:
                event = Lost("the device is stopping")  # of the pool's others it says nothing
        self.tell(event)

    def _free(self) -> None:
        """In a pool, let any device have the next copy."""
        self._asked = False
        self._device = self._transport.device

    def _topic(self) -> str:
        transport = self._transport
        if self._device is not None:
            return Layout(transport.root, self._device).request(self._name)
        assert transport.pool is not None
        return pool_request(transport.root, transport.pool, self._name)


def _refusal(message: str) -> Ended:
    """What a device with a full queue would say."""
    return Ended(OverloadedError.status, {"error": {"message": message, "hint": "try again later"}})


def _event(kind: str, payload: bytes) -> Event | None:
    """What a message of the answer says; None where it says nothing to us.

    Raises:
        ValueError, LookupError, TypeError: it is not of the protocol.
    """
    message: Mapping[str, Any] = json.loads(payload) if kind in {"evt", "tok", "done"} else {}
    match kind:
        case "evt":
            eta_ms = message.get("eta_ms")
            return Progress(
                str(message["event"]),
                message.get("device"),
                message.get("position"),
                None if eta_ms is None else float(eta_ms) / 1000,
            )
        case "tok" if not message.get("index"):
            return Text(int(message["seq"]), str(message["text"]))
        case "done":
            retry_ms = message.get("retry_after_ms")
            retry_s = None if retry_ms is None else float(retry_ms) / 1000
            return Ended(int(message["status"]), dict(message["body"]), retry_s, bool(message.get("replayed")))
        case _:
            return None
