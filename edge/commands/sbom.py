"""``qwedge sbom``: what is in here, as CycloneDX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge.commands import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sbom")(sbom)


def sbom(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A bundle's folder; without it, the installed qwedge.")
    ] = None,
) -> None:
    """Print a software bill of materials (CycloneDX 1.6, JSON): of qwedge with what it needs, or of a bundle.

    The same installation or bundle gives the same bytes. A bundle's files are not checked; `qwedge verify` does that.
    """
    from edge.bundle import read_manifest
    from edge.sbom import bundle_sbom, package_sbom

    options.print_json(package_sbom() if bundle is None else bundle_sbom(read_manifest(bundle)))
