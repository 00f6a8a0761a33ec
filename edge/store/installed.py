"""A bundle in the store."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.bundle import MANIFEST, parse_manifest, read_manifest_bytes, read_signature
from edge.errors import BundleError, SignatureError
from edge.store.state import State

if TYPE_CHECKING:  # this brings the cryptography
    from edge.signing import Trust


@dataclass(frozen=True)
class Installed:
    """One bundle of the store."""

    name: str
    """What it is called in the store: ``MODEL@`` and 12 digits of its manifest's SHA-256."""
    path: Path
    """Its folder."""
    model: str
    """The model name that requests use; several bundles may have it."""
    version: str
    counter: int
    """The manifest's."""
    size_bytes: int
    signed_by: str | None
    """Name of the trusted key that signed it; None where none did, or nothing says whom to trust."""
    active: bool
    """It is what the next start serves."""
    previous: bool
    """It is what a rollback goes to."""
    failed: bool
    """It was active, did not work, and was left."""
    installed_at: datetime
    """By the device's clock, UTC."""

    @classmethod
    def read(cls, path: Path, state: State, trust: Trust | None) -> Installed:
        """Look at a bundle's manifest and signature; its files are not touched.

        Raises:
            BundleError: they cannot be read.
        """
        raw = read_manifest_bytes(path)
        manifest = parse_manifest(raw, path / MANIFEST)
        return cls(
            name=path.name,
            path=path,
            model=manifest.name,
            version=manifest.version,
            counter=manifest.counter,
            size_bytes=sum(entry.size for entry in manifest.files),
            signed_by=_signer(raw, path, trust) if trust is not None else None,
            active=path.name == state.active,
            previous=path.name == state.previous,
            failed=path.name == state.failed,
            installed_at=_installed_at(path),
        )

    def describe(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        texts = {"path": str(self.path), "installed_at": self.installed_at.isoformat(timespec="seconds")}
        return {**vars(self), **texts}


def _signer(raw: bytes, path: Path, trust: Trust) -> str | None:
    try:
        return trust.check(raw, read_signature(path), str(path)).name
    except SignatureError:
        return None


def _installed_at(path: Path) -> datetime:
    """When the folder was filled."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint="install the bundle again") from None
