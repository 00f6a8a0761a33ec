"""Reading the manifest and its signature, and checking every file against it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge.bundle.files import Progress, hash_file, read_small
from edge.bundle.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    FileEntry,
    Manifest,
    parse_manifest,
)
from edge.errors import BundleError

if TYPE_CHECKING:  # this brings the cryptography, which only those need who sign or trust
    from edge.signing import Trust

_EXPORT_HINT = "make one with: qwedge export {} -o DIR"


def read_manifest(folder: Path, *, trust: Trust | None = None) -> Manifest:
    """Read and check ``manifest.json`` and, where there is ``trust``, its signature; the files are not touched.

    Raises:
        BundleError: there is no manifest, it is malformed, or it needs a newer runtime.
        SignatureError: no trusted key signed it.
    """
    raw = read_manifest_bytes(folder)
    if trust is not None:
        trust.check(raw, read_signature(folder), str(folder))
    return parse_manifest(raw, folder / MANIFEST)


def read_manifest_bytes(folder: Path) -> bytes:
    """``manifest.json`` as it lies there.

    Raises:
        BundleError: there is none, or it cannot be read.
    """
    if folder.is_file():
        raise BundleError(f"{folder} is a file, and a bundle is a folder", hint=_file_hint(folder))
    raw = read_small(folder / MANIFEST, MAX_MANIFEST_BYTES)
    if raw is None:
        reason = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
        model = folder if (folder / "config.json").is_file() else "MODEL"
        raise BundleError(f"{folder} is not a bundle: {reason}", hint=_EXPORT_HINT.format(model))
    return raw


def _file_hint(path: Path) -> str:
    if (path.parent / MANIFEST).is_file():
        return f"give the folder it is in: {path.parent}"
    if path.suffix == ".tar":
        return f"if it holds a bundle, install it: qwedge install {path}"
    return _EXPORT_HINT.format(path if path.suffix == ".gguf" else "MODEL")


def read_signature(folder: Path) -> bytes | None:
    """``manifest.sig`` as it lies there; None where there is none.

    Raises:
        BundleError: it cannot be read.
    """
    return read_small(folder / SIGNATURE, MAX_SIGNATURE_BYTES)


def verify_bundle(folder: Path, *, trust: Trust | None = None, progress: Progress | None = None) -> Manifest:
    """Check every file of a bundle against its manifest.

    Args:
        folder: the bundle.
        trust: the keys of which one must have signed the manifest; None = the signature is not looked at.
        progress: called with bytes hashed since the last call.

    Returns:
        The manifest.

    Raises:
        BundleError: a file is missing, extra, not a regular file, of another size, or its SHA-256 differs.
        SignatureError: no trusted key signed it.
    """
    manifest = read_manifest(folder, trust=trust)
    listed = {entry.path for entry in manifest.files}
    hint = "the copy is damaged or was changed: copy or export the bundle again"
    if extra := sorted({path.name for path in folder.iterdir()} - listed - {MANIFEST, SIGNATURE}):
        raise BundleError(f"{folder} holds a file that its manifest does not list: {extra[0]}", hint=hint)
    for entry in manifest.files:
        _verify_file(folder / entry.path, entry, hint, progress)
    return manifest


def _verify_file(path: Path, entry: FileEntry, hint: str, progress: Progress | None) -> None:
    try:
        # The size first: it costs nothing and catches most damage.
        size = path.lstat().st_size
        if size != entry.size:
            raise BundleError(f"{path} has {size} bytes, the manifest says {entry.size}", hint=hint)
        found = hash_file(path, progress=progress)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing", hint=hint) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    if found.sha256 != entry.sha256:
        raise BundleError(f"{path} was changed: its SHA-256 is not the manifest's", hint=hint)
