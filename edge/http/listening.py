"""The socket that the server listens on; apart from the server, as the port is taken before the framework is loaded."""

from __future__ import annotations

import errno
import ipaddress
import socket

from edge.errors import ConfigError, UnavailableError
from edge.settings.server import ServerSettings

BACKLOG = 512
"""Connections that wait to be accepted."""
_SEND_BUFFER_BYTES = 1 << 16
"""What the system may hold for one slow reader: enough for seconds of tokens, and small enough to notice him."""


def bind(host: str, port: int) -> socket.socket:
    """Take a TCP port, without answering on it yet.

    Args:
        host: an address or a name of this machine.
        port: 0 picks a free one; see ``getsockname()`` of the result.

    Raises:
        UnavailableError: the port is in use or not allowed, or the address is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # localhost may come as ::1 first, where clients that try 127.0.0.1 would find nobody.
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] is not socket.AF_INET)
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UnavailableError(f"cannot listen on {host}: {error.strerror}", hint="check the address") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # accepted connections inherit it
        sock.bind(address)
        # Listening right away makes a second server on this port fail here, not later.
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        hint = "choose another port" if error.errno in {errno.EADDRINUSE, errno.EACCES} else "check the address"
        raise UnavailableError(f"cannot listen on {host}:{port}: {error.strerror}", hint=hint) from None
    return sock


def check_exposure(sock: socket.socket, settings: ServerSettings, *, has_keys: bool) -> bool:
    """Whether only this device's own programs reach a socket; beyond that, somebody must be kept out.

    Args:
        sock: bound.
        settings: says who may come in.
        has_keys: whether clients need a key.

    Raises:
        ConfigError: everybody on the network could use the device, and nobody has said that it should be so.
    """
    address = sock.getsockname()[0].partition("%")[0]
    if ipaddress.ip_address(address).is_loopback:
        return True
    if not has_keys and settings.tls_client_ca is None and settings.open == "off":
        raise ConfigError(
            f"{settings.host} can be reached from the network, and there are no keys",
            hint='make one: qwedge http add-key NAME; or let everybody in: server.open = "on"',
        )
    return False
