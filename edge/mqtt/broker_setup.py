"""The embedded broker as the settings describe it, and the bridge's settings for it."""

from __future__ import annotations

import ipaddress
import secrets
import ssl
from pathlib import Path

from edge.errors import ConfigError
from edge.mqtt import homeassistant
from edge.mqtt.broker import EmbeddedBroker, Guard
from edge.mqtt.broker_clients import load_clients
from edge.mqtt.broker_config import Network, Owner
from edge.mqtt.rules import load_rules
from edge.mqtt.topics import Layout
from edge.pem import load_ca, load_pair
from edge.settings.mqtt import MqttSettings


def make_broker(settings: MqttSettings, folder: Path) -> EmbeddedBroker:
    """The broker, not started yet.

    Args:
        settings: where it listens, and what the device needs of it.
        folder: what :func:`edge.settings.folders.broker_folder` says.

    Raises:
        ConfigError: it would listen on a network without TLS or without knowing its clients, a certificate, key or CA
            cannot be used, or a rule is malformed.
        UnavailableError: another process keeps the clients busy.
    """
    clients = clients_folder(folder)
    network = _network(settings)
    if network is None and not _is_loopback(settings.listen):
        hint = "set mqtt.tls_cert and mqtt.tls_key, see docs/mqtt-security.md"
        raise ConfigError(f"the embedded broker does not listen on {settings.listen} without TLS", hint=hint)
    if network is not None and network.client_ca is None and not load_clients(clients):
        hint = "add them with `qwedge mqtt add-client NAME`, or set mqtt.tls_ca to let certificates tell who they are"
        raise ConfigError(f"the embedded broker has no clients to listen to on {settings.listen}", hint=hint)
    return EmbeddedBroker(
        settings.port,
        state_dir=folder / "messages",
        guard=Guard(_owner(settings), clients),
        network=network,
        sync=settings.broker_sync == "on",
    )


def clients_folder(folder: Path) -> Path:
    """Where in the broker's folder its clients are kept."""
    return folder / "clients"


def owner_name(settings: MqttSettings) -> str:
    """The device's own user name, which no client can have."""
    return f"device-{settings.device}"


def as_owner(settings: MqttSettings, broker: EmbeddedBroker) -> MqttSettings:
    """The bridge's settings for the started broker: the device's own user and password."""
    return settings.model_copy(update={"username": owner_name(settings), "password_file": broker.own_password_file})


def _owner(settings: MqttSettings) -> Owner:
    layout = Layout(settings.root, settings.device)
    rules = load_rules(settings)
    card = homeassistant.discovery(settings, layout, "", has_temperature=False)
    # A rule's captures may end the topic's fixed part early; an access control list knows `#` only as the last level.
    publish = [rule.publish_filter.partition("#")[0] + "#" * ("#" in rule.publish_filter) for rule in rules]
    return Owner(
        username=owner_name(settings),
        password=secrets.token_urlsafe(32),
        device=settings.device,
        root=settings.root,
        publish=(*publish, *([card.topic] if card is not None else [])),
        subscribe=tuple(rule.settings.subscribe for rule in rules),
    )


def _network(settings: MqttSettings) -> Network | None:
    """The listener with TLS, its files checked: mosquitto's own words about them help nobody."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    cert, key = load_pair(context, settings.tls_cert, settings.tls_key, section="mqtt")
    client_ca = None if settings.tls_ca is None else load_ca(context, settings.tls_ca, setting="mqtt.tls_ca")
    return Network(settings.listen, settings.tls_port, cert, key, client_ca)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
