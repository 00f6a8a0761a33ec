"""``qwedge mqtt``: what a person does over MQTT from the command line."""

from __future__ import annotations

import typer

from edge.commands import mqtt_ask, mqtt_clients, mqtt_rules


def register(app: typer.Typer) -> None:
    """Add the commands; those in other files are added to the group here."""
    group = typer.Typer(name="mqtt", no_args_is_help=True)
    group.callback()(_group)
    mqtt_ask.register(group)
    mqtt_rules.register(group)
    mqtt_clients.register(group)
    app.add_typer(group)


def _group() -> None:
    """Ask devices over MQTT, and try what they do there."""
