"""``qwedge mqtt ask``: one question to a device or a pool, from anywhere that reaches the broker."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.commands import options
from edge.settings.log import LogSettings
from edge.settings.mqtt import MqttSettings

if TYPE_CHECKING:  # these bring paho, which `qwedge --help` does without
    from edge.client import Client, Progress


def register(group: typer.Typer) -> None:
    """Add the command to ``qwedge mqtt``."""
    group.command("ask")(ask)


def ask(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="The question; without it, stdin.")] = None,
    *,
    broker: Annotated[
        str | None,
        typer.Option("--broker", metavar="B", help="mqtt://HOST:PORT [default: as configured, or on this machine]."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="D", help="Who is asked [default: this machine's name].")
    ] = None,
    pool: Annotated[
        str | None, typer.Option("--pool", metavar="MODEL", help="Ask any device of the model's pool instead.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0.1, max=86400, help="Seconds until it is given up.")
    ] = 300.0,
    client: Annotated[
        str | None,
        typer.Option("--client", metavar="NAME", help="Our name in topics [default: the user's or a new one]."),
    ] = None,
    request_id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="The request's id; the same again repeats the answer."),
    ] = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Ask a device over MQTT.

    It is said at once when there is no broker, or when the device is not online. Ctrl-C cancels the request. Root, user
    name and password file are those of the settings, as for `qwedge serve`.
    """
    from edge.client.answer import text_of

    options.log_to_stderr(LogSettings.model_validate({"level": "error"}))  # what matters about the link is in the error
    text = prompt if prompt is not None else options.read_stdin()
    settings = options.settings(config, mqtt__broker=broker).mqtt
    body: dict[str, Any] = {"messages": options.messages(system, text)}
    given = {"max_tokens": max_tokens, "temperature": temperature}
    body |= {name: value for name, value in given.items() if value is not None}
    with _client(settings, client, device, pool, timeout_s) as asker:
        asker.check()
        if stream and not as_json:
            for piece in asker.stream(body, id=request_id, on_progress=_tell):
                print(piece, end="", flush=True)
            print()
            return
        answer = asker.chat(body, id=request_id, on_progress=_tell)
    if as_json:
        options.print_json(answer)
    else:
        print(text_of(answer))


def _client(settings: MqttSettings, name: str | None, device: str | None, pool: str | None, timeout_s: float) -> Client:
    from edge.client import Client
    from edge.mqtt.password import read_password
    from edge.mqtt.tls import client_context

    address = settings.address
    url = f"mqtt://127.0.0.1:{settings.port}"
    if address is not None:
        url = f"mqtt{'s' if address.tls else ''}://{_bracketed(address.host)}:{address.port}"
    return Client(
        url,
        timeout_s=timeout_s,
        client=name,
        device=device or (settings.device if pool is None else None),
        pool=pool,
        root=settings.root,
        username=settings.username,
        password=None if settings.password_file is None else read_password(settings.password_file),
        tls=client_context(settings) if address is not None and address.tls else None,
        connect_timeout_s=min(timeout_s, 5.0),
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tell(progress: Progress) -> None:
    """Who waits at a terminal sees what for."""
    if progress.position and sys.stderr.isatty():
        eta = "" if progress.eta_s is None else f", about {progress.eta_s:.0f} s"
        options.note(f"waiting behind {progress.position}{eta}")
