"""``qwedge install``, ``activate``, ``rollback``, ``list``, ``remove`` and ``gc``: the bundles of this device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edge.commands import options
from edge.commands.gates import score_gates
from edge.commands.loading import store_of
from edge.errors import ConfigError, StoreError
from edge.store import Installed, Store, find_sources, open_source

Name = Annotated[str, typer.Argument(metavar="NAME", help="MODEL@DIGITS as in `qwedge list`, or MODEL if it is alone.")]
AllowDowngrade = Annotated[
    bool, typer.Option("--allow-downgrade", help="Also a bundle whose counter is lower than one that worked here.")
]
NoTest = Annotated[bool, typer.Option("--no-test", help="Switch without the self-test.")]
Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require", metavar="SUITE:SCORE", help="Switch only if it reaches this in `qwedge eval`; may be repeated."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("install")(install)
    app.command("activate")(activate)
    app.command("rollback")(rollback)
    app.command("list")(show)
    app.command("remove")(remove)
    app.command("gc")(gc)


def install(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder, a tar file of it, or a folder with such on it.")
    ],
    *,
    activate: Annotated[bool, typer.Option("--activate", help="Test it and switch to it, too.")] = False,
    no_test: NoTest = False,
    require: Require = None,
    allow_downgrade: AllowDowngrade = False,
    trust: options.Trust = None,
    store: options.StoreFolder = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Copy a bundle into the model store; what is served does not change.

    Signature and space are checked first, then every byte. An interrupted copy goes on where it stopped. A stick may
    hold several bundles; files that an installed one has too are not copied again.
    """
    if require and not activate:
        raise ConfigError("--require is for switching", hint="add --activate")
    gates = score_gates(require or [], config)
    models = _store(config, store, trust)
    installed = models.install(
        open_source(_choose(bundle)), watch=options.byte_progress, allow_downgrade=allow_downgrade
    )
    if activate:
        options.note("testing it: a process of its own loads it and answers" if not no_test else "switching")
        installed = models.activate(
            installed.name, gates=gates, test=not no_test, allow_downgrade=allow_downgrade, watch=options.byte_progress
        )
    _tell(installed, "active: the next start of `qwedge serve` serves" if activate else "installed:", as_json=as_json)


def activate(
    name: Name,
    *,
    no_test: NoTest = False,
    require: Require = None,
    allow_downgrade: AllowDowngrade = False,
    trust: options.Trust = None,
    store: options.StoreFolder = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Switch to an installed bundle; the next start of `qwedge serve` serves it.

    It is verified, and a process of its own loads it and generates a few tokens, before the switch. After the switch it
    is on trial: if it ends three times before it has worked for a minute, the one before is active again.
    """
    gates = score_gates(require or [], config)
    installed = _store(config, store, trust).activate(
        name, gates=gates, test=not no_test, allow_downgrade=allow_downgrade, watch=options.byte_progress
    )
    _tell(installed, "active: the next start of `qwedge serve` serves", as_json=as_json)


def rollback(
    *,
    allow_downgrade: AllowDowngrade = False,
    trust: options.Trust = None,
    store: options.StoreFolder = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Make the bundle active again that was before; the other one stays installed."""
    installed = _store(config, store, trust).rollback(allow_downgrade=allow_downgrade, watch=options.byte_progress)
    _tell(installed, "active again: the next start of `qwedge serve` serves", as_json=as_json)


def show(
    *,
    trust: options.Trust = None,
    store: options.StoreFolder = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """List the installed bundles."""
    models = _store(config, store, trust)
    bundles = models.list()
    if as_json:
        options.print_json([each.describe() for each in bundles])
        return
    if not bundles:
        options.note(f"there are no bundles in {models.folder}; `qwedge install BUNDLE` adds one")
        return
    width = max(len(each.name) for each in bundles)
    print(f"{'NAME':<{width}}  {'STATE':<8}  {'COUNTER':>7}  {'SIZE':>10}  {'INSTALLED':<16}  SIGNED BY")
    for each in bundles:
        print(
            f"{each.name:<{width}}  {_state(each):<8}  {each.counter:>7}  {each.size_bytes / 1e6:>7,.1f} MB"
            f"  {each.installed_at:%Y-%m-%d %H:%M}  {each.signed_by or '-'}"
        )


def remove(name: Name, *, store: options.StoreFolder = None, config: options.Config = None) -> None:
    """Remove an installed bundle that is not active."""
    models = _store(config, store)
    found = models.find(name)
    models.remove(found.name)
    options.note(f"removed {found.name}")


def gc(*, store: options.StoreFolder = None, config: options.Config = None) -> None:
    """Remove every bundle but the active one, the one before it and what is being served, and unfinished copies."""
    removed = _store(config, store).gc()
    for name in removed:
        options.note(f"removed {name}")
    if not removed:
        options.note("removed no bundle")


def _store(config: Path | None, folder: Path | None, trust: Path | None = None) -> Store:
    return store_of(options.settings(config, model__store=folder, model__trust=trust))


def _choose(place: Path) -> Path:
    """The bundle at a place; asks where there are several and somebody can answer.

    Raises:
        StoreError: there is none.
        ConfigError: there are several.
    """
    found = find_sources(place)
    if not found:
        raise StoreError(f"there is no bundle in {place}", hint="name a bundle's folder or a tar file of one")
    if len(found) == 1:
        return found[0]
    names = [path.name for path in found]
    if sys.stdin.isatty():
        options.note("\n".join(f"{number}  {name}" for number, name in enumerate(names, 1)))
        answer: int = typer.prompt("Which one", type=int, err=True)
        if 1 <= answer <= len(found):
            return found[answer - 1]
    raise ConfigError(f"there are {len(found)} bundles in {place}", hint=f"name one: {', '.join(names)}")


def _tell(installed: Installed, what: str, *, as_json: bool) -> None:
    if as_json:
        options.print_json(installed.describe())
    else:
        print(f"{what} {installed.name}")


def _state(installed: Installed) -> str:
    states = {"active": installed.active, "previous": installed.previous, "failed": installed.failed}
    return next((state for state, holds in states.items() if holds), "")
