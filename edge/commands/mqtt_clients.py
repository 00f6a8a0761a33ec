"""``qwedge mqtt add-client``, ``remove-client`` and ``list-clients``: who may use the embedded broker."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from edge.commands import options
from edge.errors import ConfigError
from edge.settings.folders import broker_folder
from edge.settings.mqtt import MqttSettings

_PASSWORD_BYTES = 18

Name = Annotated[str, typer.Argument(metavar="NAME", help="The client's user name and MQTT client id.")]


def register(group: typer.Typer) -> None:
    """Add the commands to ``qwedge mqtt``."""
    group.command("add-client")(add)
    group.command("remove-client")(remove)
    group.command("list-clients")(show)


def add(
    name: Name,
    *,
    password_file: Annotated[
        Path | None,
        typer.Option("--password-file", metavar="FILE", help="Its first line is the password [default: a new one]."),
    ] = None,
    publish: Annotated[
        list[str] | None,
        typer.Option("--publish", metavar="T", help="A further topic to publish on, with + and #; may be repeated."),
    ] = None,
    subscribe: Annotated[
        list[str] | None,
        typer.Option("--subscribe", metavar="T", help="A further topic to read, with + and #; may be repeated."),
    ] = None,
    manage: Annotated[
        bool, typer.Option("--manage", help="It may give commands: switch, verify, rollback, reload, restart.")
    ] = False,
    config: options.Config = None,
) -> None:
    """Let a client use the embedded broker, or change its password and topics.

    It may send requests and cancels under its own name, and read its own answers and what devices say about themselves.
    Without --password-file a password is made and printed, this once. A running broker takes the client within a
    second; from the first one on it lets nobody in without a password.
    """
    from edge.mqtt.broker_clients import BrokerClient, add_client, check_filter, check_name, hash_password
    from edge.mqtt.password import read_password

    settings = options.settings(config).mqtt
    password = secrets.token_urlsafe(_PASSWORD_BYTES) if password_file is None else read_password(password_file)
    try:
        client = BrokerClient(
            name=_not_the_device(check_name(name), settings),
            password=hash_password(password),
            publish=tuple(map(check_filter, publish or ())),
            subscribe=tuple(map(check_filter, subscribe or ())),
            manage=manage,
        )
    except ValueError as error:
        raise ConfigError(str(error), hint="qwedge mqtt add-client --help") from None
    replaced = add_client(_folder(settings), client)
    options.note(f"{'changed' if replaced else 'added'} {name} in {_folder(settings)}")
    if password_file is None:
        print(password)


def remove(name: Name, *, config: options.Config = None) -> None:
    """Let a client no longer use the embedded broker; a running one ends its connection within a second."""
    from edge.mqtt.broker_clients import remove_client

    folder = _folder(options.settings(config).mqtt)
    remove_client(folder, name)
    options.note(f"removed {name} from {folder}")


def show(*, config: options.Config = None, as_json: options.Json = False) -> None:
    """List the clients of the embedded broker, and the topics that they may use beside their own."""
    from edge.mqtt.broker_clients import load_clients

    folder = _folder(options.settings(config).mqtt)
    clients = load_clients(folder) or ()
    if as_json:
        options.print_json([client.model_dump(exclude={"password"}) for client in clients])
        return
    for client in clients:
        rights = [*(f"publish {t}" for t in client.publish), *(f"read {t}" for t in client.subscribe)]
        print("  ".join([client.name, *(["manage"] if client.manage else []), *rights]))
    if not clients:
        options.note(f"there are no clients in {folder}")


def _folder(settings: MqttSettings) -> Path:
    from edge.mqtt.broker_setup import clients_folder

    return clients_folder(broker_folder(settings, os.environ))


def _not_the_device(name: str, settings: MqttSettings) -> str:
    from edge.mqtt.broker_setup import owner_name

    own = {
        owner_name(settings),
        f"{settings.client_id}-{settings.device}",
        f"{settings.client_id}-{settings.device}-pool",
    }
    if name in own:
        raise ValueError(f"{name} is the device's own name")
    return name
