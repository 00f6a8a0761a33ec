"""``qwedge http``: the keys of HTTP clients."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.commands import options
from edge.errors import ConfigError
from edge.settings.folders import keys_file

if TYPE_CHECKING:  # this brings the web framework, which `qwedge --help` does without
    from edge.http.keys import Key


class Scope(StrEnum):
    """What a key allows."""

    GENERATE = "generate"
    READ = "read"
    MANAGE = "manage"


Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; the log and the audit log show it.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(name="http", no_args_is_help=True)
    group.callback()(_group)
    group.command("add-key")(add)
    group.command("remove-key")(remove)
    group.command("list-keys")(show)
    app.add_typer(group)


def _group() -> None:
    """Say who may use the HTTP server."""


def add(
    name: Name,
    *,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="M", help="A model it may use [default: any]; may be repeated."),
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="N/min", help="Requests a minute [default: any number].")
    ] = None,
    scope: Annotated[
        list[Scope] | None,
        typer.Option("--scope", help="What it may do [default: generate]; may be repeated."),
    ] = None,
    config: options.Config = None,
) -> None:
    """Make a key for an HTTP client, or replace the one of its name; prints it, this once.

    generate asks the model; read sees metrics, logs and the device; manage changes what is served. A running server
    takes the key at once; from the first one on it answers nobody without a key, not even on this device.
    """
    from edge.http.keys import MAX_MODELS, MAX_NAME_CHARS, Key, add_key, hash_key, new_key

    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigError(f"{name!r} is no name of a key", hint="use 1 to 64 letters, digits, '.', '_' and '-'")
    if len(model or ()) > MAX_MODELS or not all(1 <= len(each) <= MAX_NAME_CHARS for each in model or ()):
        message = f"a key names {MAX_MODELS} models at most, each by 1 to {MAX_NAME_CHARS} characters"
        raise ConfigError(message, hint="leave --model out to allow any")
    secret = new_key()
    key = Key(
        name=name,
        sha256=hash_key(secret),
        scopes=frozenset(each.value for each in scope or [Scope.GENERATE]),
        models=tuple(model or ()),
        rate_per_minute=_per_minute(rate),
    )
    path = _path(config)
    replaced = add_key(path, key)
    options.note(f"{'changed' if replaced else 'added'} {name} in {path}")
    print(secret)


def remove(name: Name, *, config: options.Config = None) -> None:
    """Let a client no longer in; a running server refuses its next request."""
    from edge.http.keys import remove_key

    path = _path(config)
    remove_key(path, name)
    options.note(f"removed {name} from {path}")


def show(*, config: options.Config = None, as_json: options.Json = False) -> None:
    """List the keys by name, with what each may do."""
    from edge.http.keys import load_keys

    path = _path(config)
    keys = load_keys(path) or ()
    if as_json:
        options.print_json([_as_json(key) for key in keys])
        return
    for key in keys:
        models = " ".join(key.models) or "any model"
        rate = "any rate" if key.rate_per_minute is None else f"{key.rate_per_minute}/min"
        print("  ".join([key.name, ",".join(sorted(key.scopes)), models, rate]))
    if not keys:
        options.note(f"there are no keys in {path}")


def _as_json(key: Key) -> dict[str, object]:
    return {
        "name": key.name,
        "scopes": sorted(key.scopes),
        "models": list(key.models),
        "rate_per_minute": key.rate_per_minute,
    }


def _path(config: Path | None) -> Path:
    return keys_file(options.settings(config).server, os.environ)


def _per_minute(rate: str | None) -> int | None:
    if rate is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})(/min)?", rate)
    if match is None:
        raise ConfigError(f"{rate!r} is no rate", hint="write it as 60/min")
    return int(match[1])
