"""Runs an ASGI application on a socket, and ends it in an orderly way.

::

    sock = bind(settings.host, settings.port)          # UnavailableError: the port is taken
    server = HttpServer(create_app(service, settings), sock)   # with Certificates(settings).context: HTTPS
    serving = asyncio.create_task(server.serve())      # returns after shutdown()
    ...                                                # wait for SIGINT or SIGTERM
    await asyncio.to_thread(service.stop, settings.drain_s)  # /health says draining, new requests get 503
    server.shutdown()
    await serving

uvicorn does the work. It has no deadline for a request that never ends and none for a client that never reads, so
:class:`DeadlineProtocol` adds them; signals stay the caller's business; nothing wakes up while the server is idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import h11
import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge.errors import RequestError
from edge.http.accepting import Acceptor
from edge.http.access import certificate_name
from edge.http.announce import Announcer
from edge.http.guard import MAX_HEADER_BYTES
from edge.http.listening import BACKLOG
from edge.openai import error_body

HEADER_S = 10.0
"""Seconds for a request's headers to arrive, the first one's from the start of the connection."""
KEEP_ALIVE_S = 30
"""Seconds for a connection to stay open without a further request."""
BODY_S = 30.0
"""Seconds for a request's body to arrive."""
WRITE_S = 20.0
"""Seconds for a client to take something of what is ready for it."""
MAX_REQUESTS = 1000
"""Requests on one connection, which is closed after the last of them."""
SHUTDOWN_S = 3
"""Seconds for the last bytes to be delivered after :meth:`HttpServer.shutdown`."""


class HttpServer:
    """One application on one socket.

    Args:
        app: the application.
        sock: as :func:`edge.http.listening.bind` returns it; closed when :meth:`serve` returns.
        tls: speaks HTTPS; None: HTTP.
        announcer: tells the network while the server accepts connections; None: nothing does.
    """

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        tls: ssl.SSLContext | None = None,
        announcer: Announcer | None = None,
    ) -> None:
        self._sock = sock
        self._server = _Server(
            sock,
            tls,
            announcer,
            uvicorn.Config(
                app,
                http=DeadlineProtocol,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",  # its warnings are about clients, who could fill the log with them
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_S,
            ),
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the socket is bound to."""
        host, port = self._sock.getsockname()[:2]
        return host, port

    async def serve(self) -> None:
        """Answer requests until :meth:`shutdown`; cancelling does the same, less politely."""
        await self._server.serve(sockets=[self._sock])

    def shutdown(self) -> None:
        """Let :meth:`serve` return once the open responses are delivered; call it on the event loop's thread."""
        self._server.leave()


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers and its tick ten times a second, and with our acceptor."""

    def __init__(
        self, sock: socket.socket, tls: ssl.SSLContext | None, announcer: Announcer | None, config: uvicorn.Config
    ) -> None:
        super().__init__(config)
        self._acceptor = Acceptor(sock, self._make_protocol, tls)
        self._announcer = announcer
        self._leaving = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        del sockets  # the acceptor has it
        self.servers = []
        self.started = True

    async def main_loop(self) -> None:
        at_work = [self._acceptor.run(), *([] if self._announcer is None else [self._announcer.run()])]
        tasks = [asyncio.create_task(work) for work in at_work]
        try:
            # The first use of a worker thread loads anyio's backend: better now than while a client waits.
            await run_in_threadpool(lambda: None)
            await self._leaving.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _make_protocol(self, on_lost: Callable[[], None]) -> asyncio.Protocol:
        return DeadlineProtocol(self.config, self.server_state, {}, on_lost=on_lost)

    def leave(self) -> None:
        self._leaving.set()


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 with deadlines for what the client has to do: send headers, send the body, read the answer."""

    def __init__(self, *args: Any, on_lost: Callable[[], None]) -> None:
        super().__init__(*args)
        self._on_lost = on_lost
        self._phase: Any = None
        self._read_clock = _Clock(self)
        self._write_clock = _Clock(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.app = _OnConnection(self.app, transport.get_extra_info("peercert"))
        self._watch_phase()

    def data_received(self, data: bytes) -> None:
        """Take bytes; a byte now and then does not move the deadline."""
        super().data_received(data)
        self._watch_phase()

    def on_response_complete(self) -> None:
        """Wait for the next request: uvicorn's keep-alive clock runs until its first byte, then ours."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:
            self._read_clock.stop()

    def pause_writing(self) -> None:
        """The client does not keep up: give it a while."""
        super().pause_writing()
        self._write_clock.start(WRITE_S)

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self._write_clock.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._read_clock.stop()
        self._write_clock.stop()
        super().connection_lost(exc)
        self._on_lost()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the shape of all errors."""
        body = json.dumps(error_body(RequestError(msg.rstrip("."), hint="send HTTP/1.1"))).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer is under way already: only close
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_phase(self) -> None:
        """One deadline for each phase in which the client has to send something."""
        phase = self.conn.their_state
        if phase is self._phase and self._read_clock.running:
            return
        self._phase = phase
        self._read_clock.stop()
        seconds = {h11.IDLE: HEADER_S, h11.SEND_BODY: BODY_S}.get(phase)
        if seconds is not None and not self.transport.is_closing():
            self._read_clock.start(seconds)


class _OnConnection:
    """The application as the requests of one connection find it.

    Args:
        app: the application.
        certificate: the client's, as :meth:`ssl.SSLSocket.getpeercert` gives it; None where there is none.
    """

    def __init__(self, app: Any, certificate: Mapping[str, Any] | None) -> None:
        self._app = app
        self._name = certificate_name(certificate) if certificate else None
        self._num_requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._num_requests += 1
        if self._name is not None:
            scope["state"]["certificate"] = self._name
        if self._num_requests >= MAX_REQUESTS:
            # uvicorn answers this with the same header, and closes the connection then.
            scope["headers"].append((b"connection", b"close"))
        await self._app(scope, receive, send)


class _Clock:
    """Closes a connection when its time is up."""

    def __init__(self, protocol: H11Protocol) -> None:
        self._protocol = protocol
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._timer is not None

    def start(self, seconds: float) -> None:
        self.stop()
        self._timer = self._protocol.loop.call_later(seconds, self._protocol.transport.abort)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
