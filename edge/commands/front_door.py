"""The HTTP server's socket, certificate, keys, audit log and announcement, as the settings have them."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge import __version__
from edge.config import Settings
from edge.settings.folders import keys_file
from edge.settings.server import ServerSettings

if TYPE_CHECKING:  # these bring the web framework, which is loaded while the bundle is verified
    from edge.http.access import Access
    from edge.http.announce import Announcer
    from edge.http.audit import AuditLog
    from edge.http.keys import KeyRing
    from edge.http.upstream import Upstream


@dataclass(frozen=True)
class FrontDoor:
    """What is needed before the model: it takes no time, and says at once what is wrong with the settings."""

    settings: Settings
    sock: socket.socket
    tls: ssl.SSLContext | None
    keys: KeyRing
    local: bool
    """Only this device's own programs come to it."""

    @classmethod
    def open(cls, settings: Settings, stack: ExitStack) -> FrontDoor:
        """Take the port, and read keys and certificate.

        Raises:
            UnavailableError: the port cannot be had.
            ConfigError: a file cannot be used, or the server would be open to the network unasked.
        """
        from edge.http.keys import KeyRing
        from edge.http.listening import bind, check_exposure
        from edge.http.tls import Certificates

        server = settings.server
        sock = stack.enter_context(bind(server.host, server.port))
        keys = KeyRing(keys_file(server, os.environ))
        keys.load()
        local = check_exposure(sock, server, has_keys=keys.asked_for)
        tls = None if server.tls_cert is None else Certificates(server).context
        return cls(settings, sock, tls, keys, local)

    @property
    def server(self) -> ServerSettings:
        """The server's settings, with the names that it may announce among those that clients may call it by."""
        from edge.http.announce import host_names

        server = self.settings.server
        if server.mdns == "off":
            return server
        names = host_names(self.settings.mqtt.device)
        return server.model_copy(update={"allowed_hosts": (*server.allowed_hosts, *names)})

    def announcer(self, model: Callable[[], str]) -> Announcer | None:
        """What announces the server on the network; None where it is not to be, or only this device reaches it.

        Args:
            model: the served model's name now.
        """
        from edge.http.announce import Announcement, Announcer, reachable_addresses

        settings = self.settings
        if settings.server.mdns == "off" or self.local:
            return None
        mqtt = {} if settings.mqtt.broker == "none" else {"root": settings.mqtt.root, "device": settings.mqtt.device}
        known = {"version": __version__, "path": "/v1", "tls": "0" if self.tls is None else "1", **mqtt}
        port = self.sock.getsockname()[1]
        return Announcer(
            lambda: Announcement(settings.mqtt.device, port, {"model": model(), **known}),
            lambda: reachable_addresses(settings.server.host),
        )

    def upstreams(self) -> tuple[Upstream, ...]:
        """The servers that answer for other models.

        Raises:
            ConfigError: a key or a CA cannot be used.
        """
        from edge.http.upstream import Upstream

        return tuple(Upstream.load(upstream) for upstream in self.settings.server.upstream)

    def access(self) -> Access:
        """Who may do what."""
        from edge.http.access import Access

        return Access(self.keys, self.settings.server, local=self.local)

    def audit(self, stack: ExitStack) -> AuditLog | None:
        """The audit log, started, where there is to be one; ``stack`` stops it.

        Raises:
            ConfigError: its file cannot be opened.
        """
        from edge.http.audit import AuditLog

        if self.settings.log.audit is None:
            return None
        audit = AuditLog(self.settings.log.audit.expanduser(), self.settings.log.audit_mb << 20)
        audit.start()
        stack.callback(audit.stop)
        return audit
