"""A client of paho's as we want it, and our messages as paho has them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Container, Sequence
from typing import Any, Final

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge.mqtt import tls
from edge.mqtt.packets import Identity, Incoming, Outgoing
from edge.settings.mqtt import BrokerAddress

MAX_PENDING: Final = 1000
"""QoS 1 messages that wait for the broker; the next one is dropped."""
MAX_INFLIGHT: Final = 20
SESSION_EXPIRY_S: Final = 3600
"""How long the broker keeps requests for a device that is away (MQTT 5)."""


def make_client(
    address: BrokerAddress,
    identity: Identity,
    version: MQTTProtocolVersion,
    *,
    keepalive_s: int,
    keep_session: bool,
    will: Outgoing | None,
) -> paho.Client:
    """A client that ``reconnect`` connects; its events have no callbacks yet."""
    is_5 = version == MQTTProtocolVersion.MQTTv5
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        identity.client_id,
        protocol=version,
        clean_session=None if is_5 else not keep_session,
        reconnect_on_failure=False,
        manual_ack=True,
    )
    client.max_queued_messages_set(MAX_PENDING)
    client.max_inflight_messages_set(MAX_INFLIGHT)
    if identity.username is not None:
        client.username_pw_set(identity.username, identity.password)
    if address.tls:
        client.tls_set_context(identity.tls or tls.default_context())
    if will is not None:
        client.will_set(will.topic, will.payload, will.qos, will.retain)
    client.on_socket_open = _set_nodelay
    # With this callback set, paho leaves all writing to the thread that runs loop(): other threads only wake it.
    client.on_socket_register_write = _leave_to_loop
    options: dict[str, Any] = {}
    if is_5:
        properties = _properties(PacketTypes.CONNECT, SessionExpiryInterval=SESSION_EXPIRY_S if keep_session else 0)
        options = {"clean_start": not keep_session, "properties": properties}
    client.connect_async(address.host, address.port, keepalive_s, **options)
    return client


def publish(client: paho.Client, message: Outgoing) -> paho.MQTTMessageInfo:
    """Hand a message over to be sent."""
    properties = _publish_properties(message) if client.protocol == MQTTProtocolVersion.MQTTv5 else None
    return client.publish(message.topic, message.payload, message.qos, message.retain, properties)


def subscribe(client: paho.Client, filters: Sequence[str], retained: Container[str]) -> int | None:
    """Ask for what matches the filters, at QoS 1.

    Args:
        client: connected.
        filters: what to subscribe to.
        retained: those of them that bring retained messages too. MQTT 3.1.1 brings them in any case.

    Returns:
        The number of the packet; None where there is no link.
    """
    if client.protocol == MQTTProtocolVersion.MQTTv5:
        _, number = client.subscribe([(topic, _options(is_retained=topic in retained)) for topic in filters])
    else:
        _, number = client.subscribe([(topic, 1) for topic in filters])
    return number


def incoming(message: paho.MQTTMessage, max_payload: int, ack: Callable[[], None]) -> Incoming:
    """A message as it came, without a payload of more than ``max_payload`` bytes."""
    properties = message.properties
    return Incoming(
        topic=message.topic,
        payload=bytes(message.payload) if len(message.payload) <= max_payload else None,
        retain=message.retain,
        response_topic=getattr(properties, "ResponseTopic", None),
        correlation=getattr(properties, "CorrelationData", None),
        expiry_s=getattr(properties, "MessageExpiryInterval", None),
        redelivered=message.dup,
        ack=ack,
    )


def _options(*, is_retained: bool) -> SubscribeOptions:
    # Retained requests are not sent on subscription, and live ones keep their flag, so that they can be told.
    handling = SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE if is_retained else SubscribeOptions.RETAIN_DO_NOT_SEND
    return SubscribeOptions(qos=1, retainAsPublished=True, retainHandling=handling)


def _set_nodelay(_client: paho.Client, _data: Any, link: Any) -> None:
    # Nagle's algorithm against delayed ACKs costs 40 ms on every QoS 1 message.
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _leave_to_loop(_client: paho.Client, _data: Any, _link: Any) -> None:
    """The loop asks paho itself whether there is something to write."""


def _publish_properties(message: Outgoing) -> Properties:
    given = {"CorrelationData": message.correlation, "MessageExpiryInterval": message.expiry_s}
    values = {name: value for name, value in given.items() if value is not None}
    return _properties(PacketTypes.PUBLISH, PayloadFormatIndicator=1, ContentType=message.content_type, **values)


def _properties(packet_type: int, **values: Any) -> Properties:
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties
