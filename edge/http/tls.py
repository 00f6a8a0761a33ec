"""HTTPS: the certificate that the server shows, taken up anew when its files change, and whom it asks for one.

Version 1.2 at least. With a client CA nobody comes in without a certificate that it vouches for.
"""

from __future__ import annotations

import logging
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from edge.errors import ConfigError
from edge.pem import load_ca, load_pair
from edge.settings.secret_files import find_secret
from edge.settings.server import ServerSettings

log = logging.getLogger(__name__)

_Version = tuple[tuple[int, int, int] | None, ...]
_PROTOCOLS: Final = ["http/1.1"]
WARN_BEFORE: Final = timedelta(days=30)
"""How long before its end a certificate is warned of, whenever it is read."""


class Certificates:
    """The certificate of the settings' files.

    Whoever connects brings the check for new files: nothing runs while nobody does, and connections that are open keep
    what they have. New files that do not fit together change nothing but the log; a renewal writes one after the other.

    Args:
        settings: with ``tls_cert`` and ``tls_key``.

    Raises:
        ConfigError: a file cannot be read, is not PEM, or certificate and key do not belong together.
    """

    def __init__(self, settings: ServerSettings) -> None:
        assert settings.tls_cert is not None
        assert settings.tls_key is not None
        self._cert, self._key, self._client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
        self._version = self._look()
        self._newest = self._load()
        self.context = self._newest
        """For the listening socket; it hands every connection to the newest certificate."""
        self.context.sni_callback = self._choose

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(_PROTOCOLS)
        cert, _ = load_pair(context, self._cert, self._key, section="server")
        _warn_of_expiry(cert)
        if self._client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            load_ca(context, self._client_ca, setting="server.tls_client_ca")
        return context

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """OpenSSL calls it in every handshake, whether the client names the server or not."""
        if (version := self._look()) != self._version:
            self._version = version
            try:
                self._newest = self._load()
            except ConfigError as error:
                log.warning("the certificate stays as it was: %s (hint: %s)", error.message, error.hint)
            else:
                log.info("a renewed certificate is in use")
        if connection.context is not self._newest:
            connection.context = self._newest

    def _look(self) -> _Version:
        return tuple(_stamp(find_secret(path)) for path in (self._cert, self._key, self._client_ca) if path is not None)


def _warn_of_expiry(cert: Path) -> None:
    """Say in time that a certificate has to be renewed; clients only say it when it is too late."""
    from cryptography import x509  # noqa: PLC0415 - servers without TLS do without it

    ends = x509.load_pem_x509_certificate(cert.read_bytes()).not_valid_after_utc
    if ends < datetime.now(UTC) + WARN_BEFORE:
        log.warning("the certificate %s ends on %s; qwedge tls renew makes a new one", cert, ends.date())


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size
