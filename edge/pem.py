"""Certificates and keys in PEM files, loaded with errors that name the setting."""

from __future__ import annotations

import ssl
from pathlib import Path

from edge.errors import ConfigError
from edge.settings.secret_files import find_secret


def load_ca(context: ssl.SSLContext, path: Path, *, setting: str) -> Path:
    """Trust the certificates in a file; returns where it was found.

    Args:
        context: what trusts them.
        path: a relative name is one of systemd's credentials where there are any.
        setting: what the file was named by: ``mqtt.tls_ca``.

    Raises:
        ConfigError: it cannot be read or holds no certificate.
    """
    found = _readable(setting, path)
    try:
        context.load_verify_locations(found)
    except ssl.SSLError:
        hint = f"{setting} names a file of certificates that begin with -----BEGIN CERTIFICATE-----"
        raise ConfigError(f"{found} holds no certificate in PEM", hint=hint) from None
    return found


def load_pair(context: ssl.SSLContext, cert: Path, key: Path, *, section: str) -> tuple[Path, Path]:
    """Show a certificate of ours; returns where both files were found.

    Args:
        context: what shows it.
        cert: the certificate, and those between it and its CA.
        key: its key.
        section: the settings' section that names both, as ``tls_cert`` and ``tls_key``.

    Raises:
        ConfigError: one cannot be read or is not PEM, the key is encrypted, or they do not belong together.
    """
    found = _readable(f"{section}.tls_cert", cert), _readable(f"{section}.tls_key", key)
    try:
        context.load_cert_chain(*found, password=lambda: _refuse_passphrase(found[1]))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            hint = f"{section}.tls_key must be the key that the certificate was made for"
            raise ConfigError(f"the key {found[1]} does not belong to the certificate {found[0]}", hint=hint) from None
        hint = "they begin with lines like -----BEGIN CERTIFICATE----- and -----BEGIN PRIVATE KEY-----"
        raise ConfigError(f"{found[0]} and {found[1]} are not a certificate and a key in PEM", hint=hint) from None
    return found


def _readable(setting: str, path: Path) -> Path:
    found = find_secret(path)
    try:
        with found.open("rb"):
            return found
    except OSError as error:
        raise ConfigError(f"{found} cannot be read: {error.strerror}", hint=f"{setting} names a PEM file") from None


def _refuse_passphrase(key: Path) -> str:
    raise ConfigError(f"the key {key} is encrypted", hint="store it without a passphrase, readable by qwedge alone")
