"""The MQTT broker: the one that we bring, or the one that we are to reach."""

from __future__ import annotations

import logging
import secrets
import time
from typing import Final

from edge.config import Settings
from edge.doctor.check import UNSEEN_HINT, Check, unseen
from edge.errors import QwedgeError, UnavailableError
from edge.mqtt.broker_program import find_mosquitto, mosquitto_version
from edge.mqtt.connection import Connection
from edge.mqtt.packets import Identity
from edge.mqtt.password import read_password
from edge.mqtt.tls import client_context
from edge.settings.mqtt import BrokerAddress, MqttSettings

ANSWER_S: Final = 5.0
_KEEPALIVE_S: Final = 10
_POLL_S: Final = 0.05


def examine_broker(settings: Settings, *, connect: bool) -> list[Check]:
    """What there is to say about MQTT.

    Args:
        settings: which broker.
        connect: whether to connect to one that is not ours.
    """
    mqtt = settings.mqtt
    if mqtt.broker == "none":
        return [Check("broker", "ok", "none is configured: HTTP alone")]
    if mqtt.address is None:
        return [_embedded()]
    return [_reachable(mqtt, mqtt.address)] if connect else []


def _embedded() -> Check:
    try:
        path = find_mosquitto()
        version = ".".join(map(str, mosquitto_version(path)))
    except UnavailableError as error:
        return Check("broker", "warn", f"{error.message}; HTTP works without", error.hint)
    return Check("broker", "ok", f"embedded: mosquitto {version} at {path}")


def _reachable(settings: MqttSettings, address: BrokerAddress) -> Check:
    if unseen(settings.password_file, settings.tls_ca, settings.tls_cert, settings.tls_key):
        return Check("broker", "warn", "its password or certificates are the service's alone", UNSEEN_HINT)
    place = f"{address.host}:{address.port}{' with TLS' if address.tls else ''}"
    try:
        identity = _identity(settings, address)
    except QwedgeError as error:
        return Check("broker", "fail", error.message, error.hint)
    if (reason := try_connection(address, identity)) is None:
        return Check("broker", "ok", f"{place} lets this device in")
    hint = "is it running, and is mqtt.broker its address? HTTP works without, and qwedge goes on trying"
    if "refused by the broker" in reason:
        hint = "check mqtt.username, mqtt.password_file or mqtt.tls_cert, and the broker's list of clients"
    return Check("broker", "warn", f"{place}: {reason}", hint)


def _identity(settings: MqttSettings, address: BrokerAddress) -> Identity:
    """Ours, but for the client id: the broker would end the running service's connection for one of the same id."""
    return Identity(
        client_id=f"{settings.client_id}-doctor-{secrets.token_hex(4)}",
        username=settings.username,
        password=None if settings.password_file is None else read_password(settings.password_file),
        tls=client_context(settings) if address.tls else None,
    )


def try_connection(address: BrokerAddress, identity: Identity) -> str | None:
    """Connect once, and leave; returns why that could not be, or None.

    Subscribes to nothing and publishes nothing.
    """
    quiet = logging.getLogger("edge.mqtt.connection")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)  # the report says it, once
    connection = Connection(
        address,
        identity,
        keepalive_s=_KEEPALIVE_S,
        filters=(),
        max_payload=0,
        on_message=lambda _message: None,
        keep_session=False,
    )
    connection.start()
    try:
        deadline = time.monotonic() + ANSWER_S
        while not connection.wait_ready(_POLL_S):
            if connection.reason or time.monotonic() > deadline:
                return connection.reason or "no answer"
        return None
    finally:
        connection.stop()
        quiet.setLevel(level)
