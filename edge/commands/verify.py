"""``qwedge verify``: is this bundle the one that was exported, and who says so?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.bundle import Manifest, read_manifest, read_manifest_bytes, read_signature, verify_bundle
from edge.commands import options
from edge.commands.options import Json, byte_progress, print_json
from edge.errors import BundleError
from edge.trust import trust_of

if TYPE_CHECKING:  # this brings the cryptography
    from edge.signing import Trust


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify")(verify)


def verify(
    bundle: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR]", help="The bundle's folder, or its name in the store [default: what is served]."
        ),
    ] = None,
    *,
    trust: options.Trust = None,
    store: options.StoreFolder = None,
    config: options.Config = None,
    as_json: Json = False,
) -> None:
    """Check every file of a bundle, and its signature where there is somebody to trust.

    Each must have the size and the SHA-256 of the manifest; none may be missing, none may be extra. With --trust the
    manifest must be signed by one of the keys in that folder.
    """
    from edge.commands.loading import bundle_of, store_of

    chosen = options.settings(config, model__trust=trust, model__store=store)
    trusted = trust_of(chosen.model)
    try:
        if bundle is None:
            folder = bundle_of(chosen)
        else:
            folder = Path(bundle) if Path(bundle).exists() else store_of(chosen).find(bundle).path
        manifest = check_bundle(folder, trusted)
        signed = _signature(folder, trusted)
    except BundleError as error:
        if as_json:
            print_json({"ok": False, "error": {"code": error.code, "message": error.message, "hint": error.hint}})
        raise
    if as_json:
        print_json({"ok": True, **_summary(manifest), **signed})
    else:
        print("ok: {name} {version}, {recipe}, {files} files, {bytes:,} bytes".format(**_summary(manifest)))
        print(_signature_text(**signed))


def check_bundle(bundle: Path, trust: Trust | None = None) -> Manifest:
    """Verify a bundle with a progress bar.

    Raises:
        BundleError: as :func:`edge.bundle.verify_bundle`.
    """
    total = sum(entry.size for entry in read_manifest(bundle, trust=trust).files)
    with byte_progress("verifying", total) as progress:
        return verify_bundle(bundle, trust=trust, progress=progress)


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "counter": manifest.counter,
        "recipe": manifest.recipe.get("name", "?"),
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files),
    }


def _signature(bundle: Path, trust: Trust | None) -> dict[str, str | None]:
    """The key that a bundle says it is signed with, and whose that is where it was checked; None where it is not."""
    signature = read_signature(bundle)
    if signature is None:
        return {"key_id": None, "signed_by": None}
    from edge.signing import parse_signature

    if trust is None:
        return {"key_id": parse_signature(signature, str(bundle)).key_id, "signed_by": None}
    key = trust.check(read_manifest_bytes(bundle), signature, str(bundle))
    return {"key_id": key.key_id, "signed_by": key.name}


def _signature_text(key_id: str | None, signed_by: str | None) -> str:
    if key_id is None:
        return "not signed"
    if signed_by is None:
        return f"says that it is signed with the key {key_id}; nobody checked: there is no --trust"
    return f"signed by {signed_by} (key {key_id})"
