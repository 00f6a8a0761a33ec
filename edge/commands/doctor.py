"""``qwedge doctor``: can this machine serve, and what should be changed?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge.commands.options import Config, Json, note, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    *,
    config: Config = None,
    as_json: Json = False,
    support_bundle: Annotated[
        Path | None,
        typer.Option(
            "--support-bundle",
            metavar="FILE.tar.gz",
            help="Write what somebody needs who helps from afar: never a secret, a prompt or a name of a host.",
        ),
    ] = None,
) -> None:
    """Check what this machine can do.

    Looks at packages, processor, memory, disk, bundle, ports, broker, clock and systemd, measures memory and disk for
    two seconds, and says what to change; exits with 1 if qwedge cannot serve here. Run it as the user that qwedge runs
    as.
    """
    from edge.doctor.report import examine

    report = examine(config)
    if as_json:
        print_json(report.document())
    else:
        print(report.text())
    if support_bundle is not None:
        from edge.doctor.support import write_support_bundle

        write_support_bundle(support_bundle, report)
        note(f"wrote {support_bundle}; have a look at it before you give it to anybody")
    if not report.ok:
        raise typer.Exit(1)
