"""What mosquitto is told: its configuration for its version, passwords, and who may use which topics."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge.mqtt.broker_clients import BrokerClient, hash_password
from edge.mqtt.topics import PROTOCOL_VERSION, SHARE_GROUP

HOST: Final = "127.0.0.1"
MAX_PACKET_BYTES: Final = 4 << 20
"""Larger packets never reach the device. Requests end at 1 MiB; those between get a 413 that says so."""
PLUGINS_SINCE: Final = (2, 1)
"""From here on plugins read passwords and access control lists; ``password_file`` and ``acl_file`` go away in 3.0 [1].

[1] https://mosquitto.org/blog/2026/01/version-2-1-0-released
"""
_PLUGIN_FOLDERS: Final = ("/usr/lib", "/usr/lib/*-linux-gnu*", "/usr/local/lib", "/usr/lib64", "/usr/lib/mosquitto")
_OWN_ITERATIONS: Final = 101
"""Rounds for our own password, which has 256 bits and needs no slowing down."""


@dataclass(frozen=True)
class Owner:
    """The device that the broker belongs to: a user with rights of its own."""

    username: str
    password: str = field(repr=False)
    device: str
    root: str
    publish: tuple[str, ...] = ()
    """Further topics on which it publishes: Home Assistant's, and those of the rules' answers."""
    subscribe: tuple[str, ...] = ()
    """Further topics that it reads: those of the rules' messages."""


@dataclass(frozen=True)
class Network:
    """The listener with TLS."""

    host: str
    port: int
    cert: Path
    key: Path
    client_ca: Path | None
    """Clients need a certificate that it signed, whose common name is their name. Without it, they need a password."""


@dataclass(frozen=True)
class Files:
    """Where the generated files lie."""

    folder: Path

    @property
    def config(self) -> Path:
        """What mosquitto is started with."""
        return self.folder / "mosquitto.conf"

    @property
    def passwords(self) -> Path:
        """Users and their hashed passwords."""
        return self.folder / "passwords"

    @property
    def acl(self) -> Path:
        """Who may use which topics."""
        return self.folder / "acl"

    @property
    def own_password(self) -> Path:
        """The device's own password, in clear."""
        return self.folder / "own-password"


def make_config(
    port: int,
    state_dir: Path | None,
    *,
    sync: bool = True,
    version: tuple[int, ...] = (2, 0),
    guarded: Files | None = None,
    network: Network | None = None,
) -> str:
    """The text of mosquitto.conf.

    Args:
        port: on loopback, without TLS.
        state_dir: where retained and queued messages are kept; None = in memory.
        sync: save them after each change, not only now and then.
        version: mosquitto's.
        guarded: users and their rights; without them, everybody on this device may do everything.
        network: the listener with TLS.
    """
    lines = [
        "set_tcp_nodelay true",  # without it a QoS 1 round trip takes 40 ms and more
        f"max_packet_size {MAX_PACKET_BYTES}",
        "max_queued_messages 1000",
        "persistent_client_expiration 1d",
        # Started by root it would change its user, lose access to its files and forget to die with its parent.
        *(["user root"] if os.geteuid() == 0 else []),
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        *_persistence(state_dir, sync),
        *_access(guarded, version),
        f"listener {port} {HOST}",
        *(_network(network) if network is not None else []),
    ]
    return "\n".join(lines) + "\n"


def make_passwords(owner: Owner, clients: Iterable[BrokerClient]) -> str:
    """The text of the password file."""
    own = f"{owner.username}:{hash_password(owner.password, iterations=_OWN_ITERATIONS)}"
    return "\n".join([own, *(f"{client.name}:{client.password}" for client in clients)]) + "\n"


def make_acl(owner: Owner, clients: Iterable[BrokerClient]) -> str:
    """The text of the access control list; whatever it does not allow is denied without a word.

    Names are those that the broker has checked (``%u``), by password or certificate, not what a client calls itself.
    """
    base = f"{owner.root}/v{PROTOCOL_VERSION}"
    lines = [
        f"pattern write {base}/dev/+/req/%u/+",
        f"pattern write {base}/dev/+/cancel/%u/+",
        f"pattern write {base}/pool/+/req/%u/+",
        f"pattern read {base}/res/%u/#",
        *(f"pattern read {base}/dev/+/{kind}" for kind in ("status", "info", "load")),
        f"user {owner.username}",
        f"topic readwrite {base}/dev/{owner.device}/#",
        f"topic write {base}/res/#",
        f"topic read {base}/pool/+/req/+/+",
        f"topic read $share/{SHARE_GROUP}/{base}/pool/+/req/+/+",
        *_topics(owner.publish, owner.subscribe),
    ]
    for client in clients:
        managed = [f"topic readwrite {base}/dev/+/cmd/+/+"] if client.manage else []
        if topics := [*managed, *_topics(client.publish, client.subscribe)]:
            lines += [f"user {client.name}", *topics]
    return "\n".join(lines) + "\n"


def find_plugin(name: str) -> Path | None:
    """Where mosquitto's plugin ``mosquitto_{name}.so`` is installed."""
    found = (Path(path) for folder in _PLUGIN_FOLDERS for path in glob.glob(f"{folder}/mosquitto_{name}.so"))  # noqa: PTH207 - absolute pattern
    return next(found, None)


def _persistence(state_dir: Path | None, sync: bool) -> list[str]:
    if state_dir is None:
        return ["persistence false"]
    # With fsync, just after the broker has confirmed: the end of its process loses a message or two, not all.
    options = ("autosave_on_changes true", "autosave_interval 1") if sync else ("autosave_interval 300",)
    return ["persistence true", f"persistence_location {state_dir.resolve()}/", *options]


def _access(guarded: Files | None, version: tuple[int, ...]) -> list[str]:
    if guarded is None:  # loopback only: whoever reaches the port is on this device
        return ["allow_anonymous true", "connection_messages false"]
    lines = ["allow_anonymous false", "log_type notice"]  # who is refused is worth knowing
    for option, path in (("password_file", guarded.passwords), ("acl_file", guarded.acl)):
        plugin = find_plugin(option) if version >= PLUGINS_SINCE else None
        lines += [f"{option} {path}"] if plugin is None else [f"global_plugin {plugin}", f"plugin_opt_{option} {path}"]
    return lines


def _network(network: Network) -> list[str]:
    lines = [
        f"listener {network.port} {network.host}",
        f"certfile {network.cert.resolve()}",
        f"keyfile {network.key.resolve()}",
        # Otherwise one client could take another's client id, and so push it out.
        "use_username_as_clientid true",
    ]
    if network.client_ca is not None:
        lines += [f"cafile {network.client_ca.resolve()}", "require_certificate true", "use_identity_as_username true"]
    return lines


def _topics(publish: Sequence[str], subscribe: Sequence[str]) -> list[str]:
    return [f"topic write {topic}" for topic in publish] + [f"topic read {topic}" for topic in subscribe]
