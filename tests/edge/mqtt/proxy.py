"""A TCP proxy before the broker: an old broker, a dead link, a broker that is no broker."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Literal, Self

from edge.settings.mqtt import BrokerAddress

Treatment = Literal["pass", "refuse", "unauthorized", "close", "garbage"]
_REPLIES: dict[Treatment, bytes] = {
    "refuse": bytes.fromhex("20020001"),  # CONNACK of MQTT 3.1.1: unacceptable protocol version
    "unauthorized": bytes.fromhex("2003008700"),  # CONNACK of MQTT 5: not authorized
    "close": b"",
    "garbage": b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


class Proxy:
    """Forwards to ``target``; MQTT 5 connections get the treatment instead, except for "pass"."""

    def __init__(self, target: BrokerAddress, treatment: Treatment = "pass") -> None:
        self.treatment = treatment
        self.num_connections = 0
        self._target = target
        self._flowing = threading.Event()
        self._flowing.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self.address = BrokerAddress("127.0.0.1", self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flowing.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()

    def stall(self) -> None:
        """From now on the link looks alive and carries nothing."""
        self._flowing.clear()

    def resume(self) -> None:
        """Carry everything again, for new connections too."""
        self._flowing.set()

    def _spawn(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.num_connections += 1
                self._sockets.append(client)
                self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        first = client.recv(4096)
        is_5 = len(first) > 8 and first[first.index(b"MQTT") + 4] == 5
        if is_5 and self.treatment != "pass":
            client.sendall(_REPLIES[self.treatment])
            client.close()
            return
        broker = socket.create_connection((self._target.host, self._target.port))
        self._sockets.append(broker)
        broker.sendall(first)
        self._spawn(self._pump, broker, client)
        self._pump(client, broker)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
