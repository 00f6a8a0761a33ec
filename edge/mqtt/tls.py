"""TLS to and from the broker: version 1.2 at least, certificates and host names always checked, no way around it."""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from edge.pem import load_ca, load_pair
from edge.settings.mqtt import MqttSettings

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_HOSTNAME_MISMATCH: Final = {62, 64}
"""OpenSSL's verdicts that a certificate is for another name, or another IP address [1].

[1] https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/
"""
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_OWN_CERTIFICATE: Final = "set mqtt.tls_cert and mqtt.tls_key to a certificate that the broker's CA has signed"


class _Socket(ssl.SSLSocket):
    """Closed where the handshake fails, which paho forgets; and one that says why nothing can be sent any more."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        """Send; where the other side has closed, its last word is read: with TLS 1.3 that is why it refuses us."""
        try:
            return super().send(data, flags)
        except (ConnectionError, ssl.SSLEOFError):
            with suppress(ConnectionError, ssl.SSLEOFError, ssl.SSLWantReadError):
                self.recv(1)
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
        load_ca(context, settings.tls_ca, setting="mqtt.tls_ca")
    if settings.tls_cert is not None and settings.tls_key is not None:
        load_pair(context, settings.tls_cert, settings.tls_key, section="mqtt")
    return context


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
