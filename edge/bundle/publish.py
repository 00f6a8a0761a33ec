"""Signing a bundle, and giving a finished one its name, so that a power cut leaves all of it or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from edge.bundle.files import Progress
from edge.bundle.manifest import MANIFEST, SIGNATURE, Manifest
from edge.bundle.verify import read_manifest_bytes, verify_bundle
from edge.durable import fsync_path, replace_durably
from edge.errors import BundleError

if TYPE_CHECKING:  # this brings the cryptography, which only those need who sign or trust
    from edge.signing import PrivateKey


def publish_bundle(staging: Path, destination: Path, manifest: Manifest, *, key: PrivateKey | None = None) -> None:
    """Write the manifest into ``staging`` and move the finished folder to ``destination``, surviving a power cut.

    Files are flushed to disk first, then the folder is renamed, then its parent is flushed: after a crash there is
    either the whole bundle or nothing under its name (docs/bundle-format.md).

    Args:
        staging: a folder with all files of the manifest.
        destination: the bundle's folder.
        manifest: what the bundle is.
        key: signs the manifest; None = the bundle is not signed.

    Raises:
        BundleError: ``destination`` exists already.
        OSError: the disk refused.
    """
    raw = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False).encode() + b"\n"
    (staging / MANIFEST).write_bytes(raw)
    if key is not None:
        (staging / SIGNATURE).write_bytes(key.sign(raw))
    for path in staging.iterdir():
        fsync_path(path)
    move_durably(staging, destination)


def sign_bundle(folder: Path, key: PrivateKey, *, progress: Progress | None = None) -> Manifest:
    """Verify the files and write ``manifest.sig``, in place of one that may be there.

    Raises:
        BundleError: the bundle is damaged.
        OSError: the disk refused.
    """
    manifest = verify_bundle(folder, progress=progress)
    raw = read_manifest_bytes(folder)
    replace_durably(folder / SIGNATURE, key.sign(raw))
    return manifest


def move_durably(staging: Path, destination: Path) -> None:
    """Give a folder whose files are on disk its final name, surviving a power cut.

    Raises:
        BundleError: ``destination`` exists already.
        OSError: the disk refused.
    """
    fsync_path(staging)
    if destination.exists():
        raise BundleError(f"{destination} exists already", hint="choose another folder or remove it first")
    staging.rename(destination)
    fsync_path(destination.parent)
