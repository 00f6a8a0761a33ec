"""The server that runs on this device, as far as it answers without a key."""

from __future__ import annotations

import http.client
import json
import ssl
from dataclasses import dataclass
from typing import Any, Final

from edge.doctor.network import is_loopback
from edge.settings.secret_files import find_secret
from edge.settings.server import ServerSettings

PAGES: Final = ("/health", "/metrics", "/v1/device", "/v1/logs")
TIMEOUT_S: Final = 3.0
MAX_BYTES: Final = 1 << 20
_EVERYWHERE: Final = frozenset({"0.0.0.0", "::", "[::]"})  # noqa: S104 - compared, not bound


@dataclass(frozen=True)
class Page:
    """What the server said."""

    status: int
    """0 where it said nothing."""
    text: str
    """The body, or why there is none."""

    def json(self) -> Any:
        """The body as JSON; the text where it is none."""
        try:
            return json.loads(self.text)
        except ValueError:
            return {"status": self.status, "text": self.text}


def ask_running(settings: ServerSettings) -> dict[str, Page]:
    """Ask a server on loopback for :data:`PAGES`; none where the settings have it elsewhere."""
    host = "127.0.0.1" if settings.host in _EVERYWHERE else settings.host.strip("[]")
    if not is_loopback(host) or settings.port == 0:
        return {}
    found = {}
    for path in PAGES:
        found[path] = _ask(settings, host, path)
        if found[path].status == 0:
            break
    return found


def _ask(settings: ServerSettings, host: str, path: str) -> Page:
    try:
        connection = _connect(settings, host)
        try:
            connection.request("GET", path, headers={"Host": "localhost"})
            answer = connection.getresponse()
            return Page(answer.status, answer.read(MAX_BYTES).decode(errors="replace"))
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        return Page(0, f"no answer: {error}")


def _connect(settings: ServerSettings, host: str) -> http.client.HTTPConnection:
    if settings.tls_cert is None:
        return http.client.HTTPConnection(host, settings.port, timeout=TIMEOUT_S)
    # Whoever listens must have the certificate of the settings; its name is not loopback's. Nothing secret is sent.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(find_secret(settings.tls_cert))
    return http.client.HTTPSConnection(host, settings.port, timeout=TIMEOUT_S, context=context)
