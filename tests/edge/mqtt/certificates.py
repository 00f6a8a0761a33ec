"""Certificates for tests, made by the openssl command line as docs/mqtt-security.md shows."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """A CA in a folder of its own."""

    def __init__(self, folder: Path, name: str = "plant") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("these tests need openssl: apt-get install openssl")
        folder.mkdir(parents=True)
        self._folder = folder
        self.pair = Pair(folder / "ca.pem", folder / "ca.key")
        self.cert = self.pair.cert
        self._openssl(*self._request(self.pair, name), "-addext", "basicConstraints=critical,CA:TRUE")

    def issue(self, name: str, alternative: str | None = None) -> Pair:
        """A certificate for a common name, and for ``DNS:...`` or ``IP:...``."""
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        signer = ("-CA", str(self.pair.cert), "-CAkey", str(self.pair.key))
        extension = () if alternative is None else ("-addext", f"subjectAltName={alternative}")
        self._openssl(*self._request(pair, name), *signer, "-addext", "basicConstraints=critical,CA:FALSE", *extension)
        return pair

    def _request(self, pair: Pair, name: str) -> tuple[str, ...]:
        kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")
        return (
            "req",
            "-x509",
            *kind,
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
            "-keyout",
            str(pair.key),
            "-out",
            str(pair.cert),
        )

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
