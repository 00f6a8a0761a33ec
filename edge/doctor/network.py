"""Ports: whether they are free, and who could come in."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from edge.config import Settings
from edge.doctor.check import UNSEEN_HINT, Check, unseen
from edge.errors import QwedgeError, UnavailableError
from edge.http.keys import KeyRing
from edge.http.tls import Certificates
from edge.mqtt.broker_setup import make_broker
from edge.settings.folders import broker_folder, keys_file
from edge.settings.mqtt import MqttSettings
from edge.settings.server import ServerSettings


def examine_network(settings: Settings) -> list[Check]:
    """What there is to say about ports."""
    server, mqtt = settings.server, settings.mqtt
    checks = [_port("http port", server.host, server.port, "--port"), _front_door(server)]
    if mqtt.broker == "embedded":
        checks.append(_port("mqtt port", "127.0.0.1", mqtt.port, "QWEDGE_MQTT_PORT"))
        checks.append(_broker_door(settings))
    return checks


def is_loopback(host: str) -> bool:
    """Whether an address or a name is this device's own alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _port(name: str, host: str, port: int, flag: str) -> Check:
    if port == 0:
        return Check(name, "ok", "any free one")
    try:
        socket.create_server((host.strip("[]"), port), family=_family(host)).close()
    except OSError as error:
        hint = f"a running qwedge, perhaps? otherwise stop what uses it, or choose another with {flag}"
        return Check(name, "warn", f"{host}:{port} cannot be used: {error.strerror}", hint)
    return Check(name, "ok", f"{host}:{port} is free")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _checked(name: str, files: Sequence[Path | None], look: Callable[[], Check]) -> Check:
    """A check that fails with what would end the start; with files that only the service sees, nothing can be said."""
    if unseen(*files):
        return Check(name, "warn", "certificates or keys are the service's alone", UNSEEN_HINT)
    try:
        return look()
    except UnavailableError as error:
        return Check(name, "warn", error.message, error.hint)
    except QwedgeError as error:
        return Check(name, "fail", error.message, error.hint)


def _front_door(server: ServerSettings) -> Check:
    files = (server.tls_cert, server.tls_key, server.tls_client_ca, server.keys_file)
    return _checked("http door", files, lambda: _who_comes_in(server))


def _broker_door(settings: Settings) -> Check:
    mqtt = settings.mqtt
    return _checked("broker door", (mqtt.tls_cert, mqtt.tls_key, mqtt.tls_ca), lambda: _who_publishes(mqtt))


def _who_comes_in(server: ServerSettings) -> Check:
    keys = KeyRing(keys_file(server, os.environ))
    keys.load()
    if server.tls_cert is not None:
        Certificates(server)  # says what is wrong with them
    guarded = keys.asked_for or server.tls_client_ca is not None
    detail = f"{'TLS' if server.tls_cert is not None else 'no TLS'}, {'clients are known' if guarded else 'no keys'}"
    if is_loopback(server.host):
        return Check("http door", "ok", f"this device's own programs; {detail}")
    if not guarded and server.open == "off":
        hint = 'qwedge http add-key NAME; or let everybody in: server.open = "on"'
        return Check("http door", "fail", f"the network; {detail}: qwedge serve refuses", hint)
    if not guarded or server.open == "on":
        return Check("http door", "warn", f"the network, everybody; {detail}", "qwedge http add-key NAME; open = off")
    if server.tls_cert is None:
        return Check("http door", "warn", f"the network; {detail}: keys can be overheard", "qwedge tls init: HTTPS")
    return Check("http door", "ok", f"the network; {detail}")


def _who_publishes(settings: MqttSettings) -> Check:
    """As the embedded broker would listen; it is made, not started.

    Raises:
        ConfigError: it would refuse to.
    """
    network = make_broker(settings, broker_folder(settings, os.environ)).network
    if network is None:
        return Check("broker door", "ok", "this device's own programs")
    who = "with a certificate" if network.client_ca is not None else "with a password"
    where = "this device's own programs" if is_loopback(network.host) else "the network"
    return Check("broker door", "ok", f"{where}; TLS, clients {who}")
