"""One connection to the broker, kept up for good.

A thread of its own connects, reads and writes, and connects again with growing, jittered pauses whenever the link is
lost. It speaks MQTT 5, and MQTT 3.1.1 to a broker that does not know MQTT 5. Incoming messages are handed to a callback
on that thread, which must only enqueue them. Whoever took one calls its ``ack`` when it is safe: until then the broker
keeps it and sends it again over the next link.

What is published while the link is down: QoS 1 messages wait in a bounded queue, QoS 0 messages are dropped.
"""

from __future__ import annotations

import logging
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Container, Sequence
from typing import Any, Final

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.exception import MQTTException
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge.mqtt import tls
from edge.mqtt.acknowledging import Acknowledgements
from edge.mqtt.packets import Identity, Incoming, Outgoing, no_ack
from edge.mqtt.paho_client import incoming, make_client, publish, subscribe
from edge.mqtt.trace import Trace
from edge.mqtt.version import VersionChoice, refusal
from edge.settings.mqtt import BrokerAddress

log = logging.getLogger(__name__)

BACKOFF_S: Final = (0.25, 3.0)
"""First and longest pause between attempts, before jitter."""
_LOOP_S: Final = 1.0
"""Longest time between two looks at the clock."""
_STABLE_S: Final = 5.0
"""A connection that lasted this long starts the backoff anew."""
_NO_MATCHING_SUBSCRIBERS: Final = 0x10
_CLOSED: Final = "closed by the other side"


class Connection:
    """Keeps one client connected between :meth:`start` and :meth:`stop`.

    Args:
        address: the broker.
        identity: client id and credentials.
        keepalive_s: a dead link is noticed within twice as long; at least 2.
        filters: what to subscribe to at first, at QoS 1.
        max_payload: bytes; the payload of a larger message is dropped at once.
        on_message: called on the network thread; must only enqueue.
        on_ready: called on the network thread whenever a link is made and the broker has confirmed the subscriptions.
        on_unheard: called on the network thread with the number (:meth:`post`) of a message that nobody is subscribed
            to; only MQTT 5 tells.
        will: published by the broker when the link is lost.
        keep_session: the broker keeps messages for us while the link is down.
        optional: filters that the broker may refuse: the link is of use without them.
        retained: filters whose subscriptions bring the retained messages. MQTT 3.1.1 brings them in any case.
        trace: notes every message that comes or goes.
    """

    def __init__(
        self,
        address: BrokerAddress,
        identity: Identity,
        *,
        keepalive_s: int,
        filters: Sequence[str],
        max_payload: int,
        on_message: Callable[[Incoming], None],
        on_ready: Callable[[], None] = lambda: None,
        on_unheard: Callable[[int], None] = lambda _number: None,
        will: Outgoing | None = None,
        keep_session: bool = True,
        optional: Container[str] = (),
        retained: Container[str] = (),
        trace: Trace | None = None,
    ) -> None:
        self._address = address
        self._identity = identity
        self._keepalive_s = keepalive_s
        self._filters = tuple(filters)
        self._max_payload = max_payload
        self._on_message = on_message
        self._on_ready = on_ready
        self._on_unheard = on_unheard
        self._will = will
        self._keep_session = keep_session
        self._optional = optional
        self._retained = retained
        self._trace = trace
        self._version = VersionChoice()  # changed by the network thread
        self._client = self._make_client()
        self._asked: dict[int | None, Sequence[str]] = {}
        """Filters by the number of the packet that subscribes to them."""
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._abandoned = threading.Event()
        self._thread: threading.Thread | None = None
        self._acks = Acknowledgements(lambda number: self._client.ack(number, 1))
        # Of the present attempt; the network thread only.
        self._answered = False
        self._reason = ""
        # Of all attempts; the network thread only.
        self._last_report = ""
        self._last_reason = ""

    @property
    def ready(self) -> bool:
        """Whether the broker has accepted us and our subscriptions."""
        return self._ready.is_set()

    @property
    def protocol(self) -> str:
        """The MQTT version in use: ``5`` or ``3.1.1``."""
        return self._version.name

    @property
    def reason(self) -> str:
        """Why there is no link; empty before the first attempt has failed."""
        return self._last_reason

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait for :attr:`ready`; returns whether it is so."""
        return self._ready.wait(timeout_s)

    def socket(self) -> socket.socket | None:
        """The TCP socket of the present link."""
        link = self._client.socket()
        return link if isinstance(link, socket.socket) else None

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._thread = threading.Thread(target=self._run, name="mqtt-network", daemon=True)
        self._thread.start()

    def stop(self, last: Outgoing | None = None, flush_s: float = 0.0) -> None:
        """Publish ``last`` after everything that waits, give that ``flush_s`` seconds, and disconnect."""
        self._stopping.set()
        if self.ready and last is not None:
            info = self._publish(last)
            # The broker confirms in order: once this one is through, all are.
            if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
                info.wait_for_publish(flush_s)
        self._client.disconnect()
        if self._thread is not None:
            self._thread.join(1.0)
            self._abandoned.set()
            self._thread.join()
            self._thread = None

    def publish(self, message: Outgoing) -> bool:
        """Send a message, or queue it while the link is down; returns False where it was dropped."""
        return self._publish(message).rc not in {MQTTErrorCode.MQTT_ERR_QUEUE_SIZE, _dropped_rc(message)}

    def post(self, message: Outgoing) -> int | None:
        """Like :meth:`publish` at QoS 1; returns the message's number, or None where it was dropped."""
        info = self._publish(message)
        return None if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE else info.mid

    def track(self, message: Outgoing) -> Callable[[], bool] | None:
        """Like :meth:`publish` at QoS 1; gives what tells whether the broker has it, or None where it was dropped."""
        info = self._publish(message)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            return None
        # Without a link it waits for the next one. paho would go on calling that a failure, even once it is through.
        info.rc = MQTTErrorCode.MQTT_ERR_SUCCESS
        return info.is_published

    def listen(self, filters: Sequence[str]) -> None:
        """Be subscribed to these filters from now on, over new links too, and to no others."""
        added, removed = set(filters) - set(self._filters), set(self._filters) - set(filters)
        self._filters = tuple(filters)
        # Without a link neither does anything; the next one begins with the new filters.
        if added:
            self._subscribe(self._client, sorted(added))
        if removed:
            self._client.unsubscribe(sorted(removed))

    def _publish(self, message: Outgoing) -> paho.MQTTMessageInfo:
        if self._trace is not None:
            self._trace.add("out", message.topic, len(message.payload))
        return publish(self._client, message)

    # --- the network thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            self._answered, self._reason = False, ""
            self._one_link()
            was_ready = self.ready
            self._ready.clear()
            if self._stopping.is_set():
                return
            if self._version.refused(self._reason):
                self._change_version()
                continue
            self._last_reason = self._reason  # of a version that is not spoken, nobody need hear
            stable = was_ready and time.monotonic() - began > _STABLE_S
            self._report_end(was_ready=was_ready, stable=stable)
            if self._version.ended(silent=self._reason == _CLOSED and not self._answered):
                self._change_version()
            attempt = 0 if stable else attempt + 1
            self._stopping.wait(backoff_s(attempt))

    def _one_link(self) -> None:
        """Connect and serve the link until it ends."""
        self._asked.clear()
        self._acks.forget()
        try:
            self._client.reconnect()
            rc = MQTTErrorCode.MQTT_ERR_SUCCESS
            while rc == MQTTErrorCode.MQTT_ERR_SUCCESS and self._client.socket() and not self._abandoned.is_set():
                rc = self._client.loop(timeout=_LOOP_S)
            closed = rc in {MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_CONN_LOST}
            self._reason = self._reason or (_CLOSED if closed else paho.error_string(rc))
        except OSError as error:
            self._reason = tls.explain(error)
        except (MQTTException, ValueError, LookupError, struct.error) as error:
            # paho raises these on packets that are not MQTT; the next link starts from nothing.
            log.debug("a malformed packet ended the link", exc_info=error)
            self._reason = "it does not speak MQTT"
        except Exception:  # whatever goes wrong on a link, the next one is made
            log.exception("the link failed")
            self._reason = "an internal error"

    def _report_end(self, *, was_ready: bool, stable: bool) -> None:
        """One line for each new state of affairs, none for its repetition."""
        report = f"{'the connection was lost' if was_ready else 'no connection'}: {self._reason}"
        if was_ready and not stable:
            # Brokers let the newest client of a name in and push the other out, often without a word.
            report += f" (does another device use the name {self._identity.client_id}?)"
        if report != self._last_report:
            log.warning("MQTT broker %s: %s; trying again, every %.0f s at most", self._place, report, BACKOFF_S[1])
        self._last_report = report

    def _change_version(self) -> None:
        self._client = self._make_client()
        log.info("MQTT broker %s: going on with MQTT %s", self._place, self.protocol)

    @property
    def _place(self) -> str:
        return f"{self._address.host}:{self._address.port}"

    # --- paho -------------------------------------------------------------------------------------------------------

    def _make_client(self) -> paho.Client:
        client = make_client(
            self._address,
            self._identity,
            self._version.version,
            # paho waits one keepalive before it pings and another for the reply, and looks at the clock once in _LOOP_S
            keepalive_s=self._keepalive_s - int(_LOOP_S),
            keep_session=self._keep_session,
            will=self._will,
        )
        if self._address.tls:
            client.on_log = self._logged
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_disconnect = self._disconnected
        client.on_publish = self._published
        client.on_message = self._received
        return client

    def _connected(
        self, client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._answered = True
        if reason.is_failure:
            self._reason = refusal(reason)
            return
        self._version.accepted()
        if self._filters:
            self._subscribe(client, self._filters)
        else:
            self._linked()

    def _subscribe(self, client: paho.Client, filters: Sequence[str]) -> None:
        self._asked[subscribe(client, filters, self._retained)] = filters

    def _subscribed(
        self, _client: paho.Client, _data: Any, mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        filters = self._asked.pop(mid, ())
        refused = [topic for topic, reason in zip(filters, reasons, strict=False) if reason.is_failure]
        if refused and all(topic in self._optional for topic in refused):
            log.error("the broker does not let %s subscribe to %s", self._identity.client_id, ", ".join(refused))
        elif any(reason.is_failure for reason in reasons):
            self._last_reason = "the broker does not allow the subscriptions"
            log.error("the broker does not let %s subscribe to its topics", self._identity.client_id)
            return
        if not self.ready:
            self._linked()

    def _linked(self) -> None:
        log.info("connected to the MQTT broker %s (MQTT %s)", self._place, self.protocol)
        self._last_report = ""
        self._ready.set()
        self._on_ready()

    def _disconnected(
        self, _client: paho.Client, _data: Any, flags: Any, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._reason = f"closed by the broker: {reason}"

    def _logged(self, _client: paho.Client, _data: Any, _level: int, text: str) -> None:
        # With TLS 1.3 a broker refuses our certificate after the handshake; paho only logs why the link ended.
        self._reason = self._reason or tls.explain_alert(text)

    def _published(
        self, _client: paho.Client, _data: Any, mid: int, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if reason.is_failure:
            log.warning("the broker refused a message: %s", reason)
        if reason.is_failure or reason.value == _NO_MATCHING_SUBSCRIBERS:
            self._on_unheard(mid)

    def _received(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        ack = self._acks.expect(message.mid) if message.qos else no_ack
        if self._trace is not None:
            self._trace.add("in", message.topic, len(message.payload))
        # An exception would end the link before the message is acknowledged, and so bring it back for ever.
        try:
            self._on_message(incoming(message, self._max_payload, ack))
        except Exception:
            log.exception("a message could not be taken")
            ack()


def backoff_s(attempt: int) -> float:
    """Pause before the next attempt after ``attempt`` failures in a row: exponential with jitter."""
    first, longest = BACKOFF_S
    return random.uniform(0.5, 1.0) * min(first * 2.0 ** min(attempt, 16), longest)  # noqa: S311 - no secret


def _dropped_rc(message: Outgoing) -> MQTTErrorCode | None:
    """The result that means dropped for this message: QoS 1 without a link is queued, QoS 0 is lost."""
    return MQTTErrorCode.MQTT_ERR_NO_CONN if message.qos == 0 else None
