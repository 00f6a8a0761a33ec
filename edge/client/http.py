"""Requests over HTTP, with the standard library: one connection for each, closed to cancel it."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, Final
from urllib.parse import SplitResult

from edge.client.chunks import ChunkMerger
from edge.client.wire import CLOSED, Ended, Event, Lost, Progress, Question, Tell
from edge.errors import (
    CancelledError,
    DeadlineError,
    EngineError,
    OverloadedError,
    UnavailableError,
)

HEALTH_S: Final = 5.0
"""How long a server may take to say how it is."""
_STATUS_OF_CODE: Final = {
    error.code: error.status
    for error in (CancelledError, DeadlineError, EngineError, OverloadedError, UnavailableError)
}
"""Of failures within a stream, which carry no status."""


class HttpTransport:
    """One server.

    Args:
        url: ``http://HOST:PORT`` or ``https://HOST:PORT``, perhaps with a path above ``/v1``.
        tls: for ``https``; None = the system's CAs.
        key: the API key; None = none is sent.
        connect_timeout_s: how long a connection may take.
    """

    def __init__(
        self, url: SplitResult, *, tls: ssl.SSLContext | None, key: str | None, connect_timeout_s: float
    ) -> None:
        self._url = url
        self._tls = tls
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        """Of every request."""
        self.timeout_s = connect_timeout_s
        """How long a connection may take."""
        self._calls: set[_Call] = set()
        self._reached = False

    def connect(self) -> None:
        """See :class:`~edge.client.wire.Transport`."""
        if self._reached:
            return
        try:
            self.open().close()
        except OSError as error:
            hint = "is the server running, and is this its address?"
            reason = error.strerror or str(error)
            raise UnavailableError(f"no connection to {self._url.geturl()}: {reason}", hint=hint) from None
        self._reached = True

    def check(self) -> None:
        """See :class:`~edge.client.wire.Transport`: the server says how it is."""
        self.connect()
        try:
            connection = self.open()
            connection.timeout = HEALTH_S
            connection.request("GET", f"{self.path}/health")
            health = json.loads(connection.getresponse().read())["status"]
            connection.close()
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            raise UnavailableError(f"{self._url.geturl()} is no qwedge server: {error}") from None
        if health != "ok":
            raise UnavailableError(f"the server is {health}", hint="try again later")

    def call(self, question: Question, tell: Tell) -> _Call:
        """See :class:`~edge.client.wire.Transport`."""
        call = _Call(self, question, tell)
        self._calls.add(call)
        return call

    def close(self) -> None:
        """See :class:`~edge.client.wire.Transport`."""
        for call in list(self._calls):
            call.tell(CLOSED)
            call.close()

    def forget(self, call: _Call) -> None:
        """A call has ended."""
        self._calls.discard(call)

    @property
    def path(self) -> str:
        """What comes before ``/v1``."""
        return self._url.path.rstrip("/").removesuffix("/v1")

    def open(self) -> HTTPConnection:
        """A new connection.

        Raises:
            OSError: there is none to be had.
        """
        host, port = self._url.hostname or "", self._url.port
        if self._url.scheme == "https":
            connection: HTTPConnection = HTTPSConnection(host, port, timeout=self.timeout_s, context=self._tls)
        else:
            connection = HTTPConnection(host, port, timeout=self.timeout_s)
        connection.connect()
        _tune(connection.sock)
        return connection


class _Call:
    """One request; see :class:`~edge.client.wire.Call`. Each copy has a connection and a thread."""

    def __init__(self, transport: HttpTransport, question: Question, tell: Tell) -> None:
        self._transport = transport
        self._question = question
        self.tell = tell
        self._lock = threading.Lock()
        self._connection: HTTPConnection | None = None
        self._busy = False
        """Whether a copy is on its way."""
        self._closed = False
        self.first_word_s = (transport.timeout_s, transport.timeout_s)

    def send(self, attempt: int, remaining_s: float | None) -> None:  # noqa: ARG002 - HTTP has no words for them
        # A copy that is being answered needs no other: its connection tells when that is over.
        if not self._busy:
            self._busy = True
            threading.Thread(target=self._run, name="qwedge-http", daemon=True).start()

    def cancel(self) -> None:
        """Closing the connection ends the request."""

    def close(self) -> None:
        with self._lock:
            self._closed = True
            link = None if self._connection is None else self._connection.sock
        if link is not None:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it
        self._transport.forget(self)

    # --- the thread of a copy ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            connection = self._transport.open()
            try:
                self._converse(connection)
            finally:
                connection.close()
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            self._end(Lost(f"the link to the server was lost: {error}"))

    def _converse(self, connection: HTTPConnection) -> None:
        with self._lock:
            if self._closed:
                return
            self._connection = connection
        connection.request("POST", self._path(), self._payload(), self._headers())
        self.tell(Progress("sent"))
        response = connection.getresponse()
        streamed = response.headers.get_content_type() == "text/event-stream"
        for event in _events_of_stream(response) if streamed else [_outcome(response)]:
            if isinstance(event, Ended):
                self._end(event)
            else:
                self.tell(event)

    def _end(self, event: Event) -> None:
        self._busy = False  # before anybody hears of it, and sends the next copy
        self.tell(event)

    def _path(self) -> str:
        body = self._question.body
        name = "completions" if "prompt" in body else "embeddings" if "input" in body else "chat/completions"
        return f"{self._transport.path}/v1/{name}"

    def _payload(self) -> bytes:
        body = dict(self._question.body)
        if self._question.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        else:
            body.pop("stream", None)
        return json.dumps(body).encode()

    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", "X-Request-Id": self._question.id, **self._transport.headers}


def _outcome(response: HTTPResponse) -> Ended:
    """The answer, or the refusal, in one piece."""
    body = json.loads(response.read())
    retry_ms = (body.get("error") or {}).get("retry_after_ms")
    return Ended(response.status, body, None if retry_ms is None else float(retry_ms) / 1000)


def _events_of_stream(response: HTTPResponse) -> Iterator[Event]:
    """The events of an answer that comes in pieces.

    Raises:
        HTTPException: it ended without an end.
        ValueError, LookupError, TypeError: it is no answer.
    """
    chunks = ChunkMerger()
    for line in response:
        kind, _, rest = line.decode().strip().partition(":")
        if kind == "" and rest:
            yield _progress(rest)
        elif rest.strip() == "[DONE]":
            yield Ended(200, chunks.body())
            return
        elif kind == "data":
            message = json.loads(rest)
            if "error" in message:
                status = _STATUS_OF_CODE.get(message["error"].get("code"), EngineError.status)
                yield Ended(status, message)
                return
            yield from chunks.take(message)
    raise HTTPException("the stream broke off")


def _progress(comment: str) -> Progress:
    """From ``queued position=2 eta_s=4.5``."""
    name, *pairs = comment.split()
    values: dict[str, Any] = dict(pair.partition("=")[::2] for pair in pairs)
    position, eta_s = values.get("position"), values.get("eta_s")
    return Progress(name, None, None if position is None else int(position), None if eta_s is None else float(eta_s))


def _tune(link: socket.socket) -> None:
    """No delays, no limit to how long an answer takes, and an end to links that are dead without a word."""
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}.items():
        if hasattr(socket, name):  # not on every system
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
