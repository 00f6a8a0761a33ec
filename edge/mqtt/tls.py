"""TLS to and from the broker: version 1.2 at least, certificates and host names always checked, no way around it."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from edge.errors import ConfigError
from edge.settings.secret_files import find_secret
from edge.settings.mqtt import MqttSettings

_HOSTNAME_MISMATCH: Final = {62, 64}
"""OpenSSL's verdicts that a certificate is for another name, or another IP address [1].

[1] https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/
"""
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_OWN_CERTIFICATE: Final = "set mqtt.tls_cert and mqtt.tls_key to a certificate that the broker's CA has signed"


class _Socket(ssl.SSLSocket):
    """Closed where the handshake fails; paho forgets it then."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def _make_context() -> ssl.SSLContext:
    """Checks certificates and host names; trusts nobody yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _Socket
    return context


def default_context() -> ssl.SSLContext:
    """Trusts the system's CAs."""
    context = _make_context()
    context.load_default_certs()
    return context


def client_context(settings: MqttSettings) -> ssl.SSLContext:
    """How we speak TLS to a broker: who may vouch for it, and with what certificate of ours.

    Raises:
        ConfigError: a file cannot be read, is not PEM, or certificate and key do not belong together.
    """
    if settings.tls_ca is None:
        context = default_context()
    else:  # alone: one of the system's might vouch for somebody else's broker
        context = _make_context()
        load_ca(context, settings.tls_ca)
    if settings.tls_cert is not None and settings.tls_key is not None:
        load_pair(context, settings.tls_cert, settings.tls_key)
    return context


def load_ca(context: ssl.SSLContext, path: Path) -> Path:
    """Trust the certificates in a file; returns where it was found.

    Raises:
        ConfigError: it cannot be read or holds no certificate.
    """
    found = _readable("tls_ca", path)
    try:
        context.load_verify_locations(found)
    except ssl.SSLError:
        hint = "mqtt.tls_ca names a file of certificates that begin with -----BEGIN CERTIFICATE-----"
        raise ConfigError(f"{found} holds no certificate in PEM", hint=hint) from None
    return found


def load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> tuple[Path, Path]:
    """Show a certificate of ours; returns where both files were found.

    Raises:
        ConfigError: one cannot be read or is not PEM, the key is encrypted, or they do not belong together.
    """
    found = _readable("tls_cert", cert), _readable("tls_key", key)
    try:
        context.load_cert_chain(*found, password=lambda: _refuse_passphrase(found[1]))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            hint = "mqtt.tls_key must be the key that the certificate was made for"
            raise ConfigError(f"the key {found[1]} does not belong to the certificate {found[0]}", hint=hint) from None
        hint = "they begin with lines like -----BEGIN CERTIFICATE----- and -----BEGIN PRIVATE KEY-----"
        raise ConfigError(f"{found[0]} and {found[1]} are not a certificate and a key in PEM", hint=hint) from None
    return found


def explain(error: OSError) -> str:
    """Why a connection could not be made, with what to do about it where that can be told."""
    if isinstance(error, ssl.SSLCertVerificationError):
        verdict, code = error.verify_message, error.verify_code
        if code in _HOSTNAME_MISMATCH:
            return f"the broker's certificate is for another name: {verdict} (name the broker as its certificate does)"
        if code in {_NOT_YET_VALID, _EXPIRED}:
            return f"the broker's certificate is not accepted: {verdict} (is this device's clock right?)"
        return f"the broker's certificate is not trusted: {verdict} (set mqtt.tls_ca to the CA that signed it)"
    if isinstance(error, ssl.SSLError):
        return explain_alert(str(error)) or f"no TLS with the broker: {error.reason or error} (is it the TLS port?)"
    return error.strerror or str(error)


def explain_alert(text: str) -> str:
    """What the broker's TLS says about us, from OpenSSL's message; empty where it says nothing about us."""
    text = text.upper().replace(" ", "_")
    if "ALERT" not in text:
        return ""
    if "CERTIFICATE_REQUIRED" in text or "HANDSHAKE_FAILURE" in text:
        return f"the broker asks for a certificate ({_OWN_CERTIFICATE})"
    if "UNKNOWN_CA" in text or "BAD_CERTIFICATE" in text or "CERTIFICATE_UNKNOWN" in text:
        return f"the broker does not trust our certificate ({_OWN_CERTIFICATE})"
    if "CERTIFICATE_EXPIRED" in text or "CERTIFICATE_REVOKED" in text:
        return "the broker says that our certificate has expired or was revoked (renew mqtt.tls_cert)"
    return ""


def _readable(setting: str, path: Path) -> Path:
    found = find_secret(path)
    try:
        with found.open("rb"):
            return found
    except OSError as error:
        hint = f"mqtt.{setting} names a PEM file"
        raise ConfigError(f"{found} cannot be read: {error.strerror}", hint=hint) from None


def _refuse_passphrase(key: Path) -> str:
    raise ConfigError(f"the key {key} is encrypted", hint="store it without a passphrase, readable by qwedge alone")
