"""Takes connections off the listening socket: so many at once, so many from one address, TLS within a deadline.

asyncio's own servers know no limits, and count a connection only once its TLS handshake is done: whoever never finishes
one would cost a file descriptor for a minute each.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
"""Connections at once, those in a TLS handshake included; more are closed at once."""
MAX_PER_ADDRESS = 256
"""Of these, from one address: one machine that goes wild leaves room for the others."""
HANDSHAKE_S = 10.0
"""Seconds for a TLS handshake."""
_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_RETRY_S: Final = 0.5
"""When to try again after the system was short of something."""

MakeProtocol = Callable[[Callable[[], None]], asyncio.Protocol]
"""Makes what speaks on a connection; it calls its argument when a connection that was made is lost."""


class Acceptor:
    """Accepts until it is cancelled.

    Args:
        sock: listens.
        make_protocol: as above.
        tls: None speaks plainly.
    """

    def __init__(self, sock: socket.socket, make_protocol: MakeProtocol, tls: ssl.SSLContext | None) -> None:
        self._sock = sock
        self._make_protocol = make_protocol
        self._tls = tls
        self._num_by_address: Counter[str] = Counter()
        self._connecting: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Accept connections; those that are made stay when this ends."""
        loop = asyncio.get_running_loop()
        short_of: str | None = None
        try:
            while True:
                try:
                    connection, address = await loop.sock_accept(self._sock)
                except OSError as error:  # no descriptors or memory; or a client that has left already
                    if error.errno in _SHORT and error.strerror != short_of:
                        short_of = error.strerror
                        log.warning("connections cannot be accepted: %s", short_of)
                    await asyncio.sleep(_RETRY_S if error.errno in _SHORT else 0)
                    continue
                short_of = None
                self._take(connection, address[0])
                await asyncio.sleep(0)  # sock_accept returns without a pause while connections wait
        finally:
            for task in self._connecting:
                task.cancel()

    def _take(self, connection: socket.socket, address: str) -> None:
        if self._num_by_address.total() >= MAX_CONNECTIONS or self._num_by_address[address] >= MAX_PER_ADDRESS:
            connection.close()
            return
        self._num_by_address[address] += 1
        task = asyncio.get_running_loop().create_task(self._connect(connection, address))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        protocol = self._make_protocol(lambda: self._leave(address))
        deadline = None if self._tls is None else HANDSHAKE_S
        try:
            await loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self._tls, ssl_handshake_timeout=deadline
            )
        except OSError as error:  # TLS errors and the deadline are some, too
            self._leave(address)
            log.debug("no connection with %s: %s", address, error)

    def _leave(self, address: str) -> None:
        self._num_by_address[address] -= 1
        if not self._num_by_address[address]:
            del self._num_by_address[address]
