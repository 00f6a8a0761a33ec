"""A real HTTP server on a free port over the fake engine, and what tests of it need."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from edge.http.app import create_app
from edge.http.listening import bind
from edge.http.server import HttpServer
from edge.http.tls import Certificates
from edge.service import Service
from edge.settings.server import ServerSettings
from tests.fakes import FakeEngine, make_service


@dataclass
class Served:
    """A server that runs in a thread of its own."""

    url: str
    port: int
    engine: FakeEngine
    service: Service
    client: httpx.Client

    def connect(self) -> socket.socket:
        """A plain connection to the server."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    @contextmanager
    def asking(self, text: str = "Hi") -> Iterator[Callable[[], int]]:
        """Ask in a thread while the block runs; gives a function that returns the status, once the block has ended."""
        statuses: list[int] = []

        def ask() -> None:
            body = {"messages": [{"role": "user", "content": text}]}
            answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60, verify=False)
            statuses.append(answer.status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield lambda: statuses[0]
        finally:
            self.engine.gate.set()  # a block that fails must not wait for an engine that hangs
            thread.join()

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """One request hangs in the engine's only slot and one waits, until the block ends or opens the gate."""
        self.engine.gate.clear()
        with self.asking():
            # The second only when the first has its slot: a queue of one would refuse it.
            wait_for(lambda: self.service.stats().num_running == 1)
            with self.asking():
                wait_for(lambda: self.service.stats().num_waiting == 1)
                yield

    @contextmanager
    def going_on(self, when: Callable[[], bool]) -> Iterator[None]:
        """Open the engine's gate from a thread as soon as something is so."""

        def watch() -> None:
            wait_for(when)
            self.engine.gate.set()

        thread = threading.Thread(target=watch)
        thread.start()
        yield
        thread.join()


@contextmanager
def serving(service: Service, settings: ServerSettings, **app: Any) -> Iterator[tuple[str, int]]:
    """Serve until the block ends; gives host and port. ``app`` is for :func:`create_app`."""
    tls = None if settings.tls_cert is None else Certificates(settings).context
    sock = bind(settings.host, settings.port)
    ready: list[tuple[HttpServer, asyncio.AbstractEventLoop]] = []
    started = threading.Event()

    async def main() -> None:
        ready.append((HttpServer(create_app(service, settings, **app), sock, tls), asyncio.get_running_loop()))
        started.set()
        await ready[0][0].serve()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="http")
    if not service.stats().accepting:
        service.start()
    thread.start()
    assert started.wait(60)
    http, loop = ready[0]
    try:
        yield http.address
    finally:
        service.stop()
        loop.call_soon_threadsafe(http.shutdown)
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def served(
    engine: FakeEngine, *, max_queue: int, settings: ServerSettings, prefix_cache_bytes: int = 0, **app: Any
) -> Iterator[Served]:
    """Serve a fake engine's answers until the block ends; ``app`` is for :func:`create_app`."""
    service = make_service(engine, max_queue=max_queue, prefix_cache_bytes=prefix_cache_bytes)
    scheme = "http" if settings.tls_cert is None else "https"
    with (
        serving(service, settings, **app) as (host, port),
        # Tests of TLS bring clients of their own, that check certificates. Reading the usual ones takes 25 ms.
        httpx.Client(base_url=f"{scheme}://{host}:{port}", timeout=60, verify=False) as client,
    ):
        try:
            yield Served(f"{scheme}://{host}:{port}", port, engine, service, client)
        finally:
            engine.gate.set()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until something is so; fails when it does not become so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
