"""``qwedge verify``: is this bundle the one that was exported?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edge.bundle import Manifest, read_manifest, verify_bundle
from edge.commands.options import Json, byte_progress, print_json
from edge.errors import BundleError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify")(verify)


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle's folder.")],
    *,
    as_json: Json = False,
) -> None:
    """Check every file of a bundle.

    Each must have the size and the SHA-256 of the manifest; none may be missing, none may be extra.
    """
    try:
        manifest = check_bundle(bundle)
    except BundleError as error:
        if as_json:
            print_json({"ok": False, "error": {"code": error.code, "message": error.message, "hint": error.hint}})
        raise
    if as_json:
        print_json({"ok": True, **_summary(manifest)})
    else:
        print("ok: {name} {version}, {recipe}, {files} files, {bytes:,} bytes".format(**_summary(manifest)))


def check_bundle(bundle: Path) -> Manifest:
    """Verify a bundle with a progress bar.

    Raises:
        BundleError: as :func:`edge.bundle.verify_bundle`.
    """
    total = sum(entry.size for entry in read_manifest(bundle).files)
    with byte_progress("verifying", total) as progress:
        return verify_bundle(bundle, progress=progress)


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "recipe": manifest.recipe.get("name", "?"),
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files),
    }
