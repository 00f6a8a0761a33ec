"""Passes requests for named models on to another OpenAI-compatible server: off unless the operator names one.

Only the body goes there, with the operator's key: never the client's key, cookies or address. Only the configured host
is spoken to: redirects are errors. An answer is passed on as it comes and marked; there is no falling back, neither
from here to there nor the other way. The HTTP client is h11, which the server brings, over asyncio's streams.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import h11
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge import __version__
from edge.errors import CancelledError, ConfigError, OverloadedError, QwedgeError, UpstreamError
from edge.http.body import again, read_body
from edge.http.caller import Exchange
from edge.http.disconnect import unless_disconnected
from edge.openai import parse_body
from edge.pem import load_ca
from edge.service import Service
from edge.settings.secret_files import find_secret
from edge.settings.upstream import UpstreamSettings

log = logging.getLogger(__name__)

PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"})
"""What is passed on."""
HEADER: Final = b"x-qwedge-upstream"
CONNECT_S: Final = 10.0
"""Seconds for a connection with TLS."""
_PREFIX: Final = "/v1"
_READ_BYTES: Final = 1 << 16
_MAX_HEAD_BYTES: Final = 1 << 16


class Upstreams:
    """ASGI middleware that takes requests for the upstreams' models, and leaves all others alone.

    Args:
        app: answers all others.
        service: whose own model is never passed on.
        upstreams: where the rest goes.
    """

    def __init__(self, app: ASGIApp, service: Service, upstreams: Sequence[Upstream]) -> None:
        self._app = app
        self._service = service
        self._by_model = {model: upstream for upstream in upstreams for model in upstream.settings.models}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, here or there."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        body = await read_body(receive)
        model = await run_in_threadpool(_model_of, body)
        upstream = self._by_model.get(model)
        if upstream is None or model == self._service.model.manifest.name:
            await self._app(scope, again(body, receive), send)
            return
        exchange: Exchange = scope["state"]["exchange"]
        exchange.caller.check_model(model)
        exchange.model = model
        path = scope["path"].removeprefix(_PREFIX)
        with suppress(CancelledError):
            await unless_disconnected(receive, upstream.answer(path, body, exchange, send))


@dataclass(frozen=True)
class Upstream:
    """One server; made by :meth:`load`."""

    settings: UpstreamSettings
    key: str | None
    tls: ssl.SSLContext | None

    @classmethod
    def load(cls, settings: UpstreamSettings) -> Upstream:
        """Read the key and the CAs.

        Raises:
            ConfigError: a file cannot be used.
        """
        key = None if settings.key_file is None else _read_key(settings)
        if not settings.address[3]:
            return cls(settings, key, None)
        context = ssl.create_default_context() if settings.tls_ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.tls_ca is not None:
            load_ca(context, settings.tls_ca, setting="server.upstream.tls_ca")
        return cls(settings, key, context)

    async def answer(self, path: str, body: bytes, exchange: Exchange, send: Send) -> None:
        """Send a request there and its answer on.

        Raises:
            UpstreamError: there is no answer, or none that could be passed on.
            OverloadedError: it is busy.
        """
        started = False
        try:
            async with aclosing(self._exchange(path, body)) as events:
                head = await anext(events)
                assert isinstance(head, h11.Response)
                self._check(head)
                await send(self._start(head))
                started = True
                mark = _Mark(self.settings.name)
                async for event in events:
                    if isinstance(event, h11.Data) and (data := mark.push(bytes(event.data))):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": mark.flush(), "more_body": False})
        except (OSError, TimeoutError, h11.RemoteProtocolError, StopAsyncIteration) as error:
            exchange.failed = True
            failure = self._failure(error)
            log.warning("%s: %s", exchange.id, failure.message)
            if started:  # the status has been sent: all that is left is to end without an end
                raise ConnectionAbortedError(failure.message) from None
            raise failure from None

    async def _exchange(self, path: str, body: bytes) -> AsyncGenerator[h11.Event, None]:
        """The events of a response: its head, its data."""
        host, port, prefix, _ = self.settings.address
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=self.tls)
        try:
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
            request = h11.Request(method="POST", target=prefix + path, headers=self._headers(host, port, len(body)))
            for event in (request, h11.Data(data=body), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            while True:
                answered = connection.next_event()
                if answered is h11.NEED_DATA:
                    async with asyncio.timeout(self.settings.timeout_s):
                        connection.receive_data(await reader.read(_READ_BYTES))
                elif isinstance(answered, h11.EndOfMessage):
                    return
                elif isinstance(answered, h11.Response | h11.Data):
                    yield answered
                elif isinstance(answered, h11.ConnectionClosed):
                    raise ConnectionResetError("the connection was closed")
        finally:
            writer.close()

    def _headers(self, host: str, port: int, length: int) -> list[tuple[str, str]]:
        headers = [
            ("host", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"),
            ("content-type", "application/json"),
            ("content-length", str(length)),
            ("accept-encoding", "identity"),
            ("user-agent", f"qwedge/{__version__}"),
            ("connection", "close"),
        ]
        return headers if self.key is None else [*headers, ("authorization", f"Bearer {self.key}")]

    def _check(self, head: h11.Response) -> None:
        """What is an answer to the client's request is passed on, errors too; the rest is between us and the server."""
        status, name = head.status_code, self.settings.name
        if status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
            retry = dict(head.headers).get(b"retry-after", b"")
            seconds = float(retry) if retry.isdigit() and len(retry) < 6 else 5.0
            raise OverloadedError(f"the upstream {name} is busy", hint="try again later", retry_after_s=seconds)
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            hint = "check the key_file of this upstream in the [server] settings"
            raise UpstreamError(f"the upstream {name} does not accept the device's key", hint=hint)
        if not (status < 300 or 400 <= status < 500):
            raise UpstreamError(f"the upstream {name} answered with status {status}", hint="look at its log")

    def _start(self, head: h11.Response) -> Message:
        kind = dict(head.headers).get(b"content-type", b"application/json")
        headers = [(b"content-type", kind), (HEADER, self.settings.name.encode())]
        return {"type": "http.response.start", "status": head.status_code, "headers": headers}

    def _failure(self, error: BaseException) -> UpstreamError:
        late = isinstance(error, TimeoutError)
        reason = "does not answer in time" if late else f"cannot be reached: {error or type(error).__name__}"
        failure = UpstreamError(f"the upstream {self.settings.name} {reason}", hint="check it and the network")
        if late:
            failure.status = HTTPStatus.GATEWAY_TIMEOUT
        return failure


class _Mark:
    """Puts ``"upstream": NAME`` first into the JSON object of a body, or into each of a stream of events.

    The text is not parsed: it may be a part of an object that goes on for seconds.
    """

    def __init__(self, name: str) -> None:
        self._field = b'"upstream":' + json.dumps(name).encode() + b","
        self._line = b""

    def push(self, data: bytes) -> bytes:
        """Take bytes; gives the whole lines."""
        lines = (self._line + data).split(b"\n")
        self._line = lines.pop()
        return b"".join(self._mark(line) + b"\n" for line in lines)

    def flush(self) -> bytes:
        """The rest."""
        line, self._line = self._line, b""
        return self._mark(line)

    def _mark(self, line: bytes) -> bytes:
        for start in (b"data: {", b"data:{", b"{"):
            if line.startswith(start):
                rest = line[len(start) :]
                field = self._field.rstrip(b",") if rest.strip().startswith(b"}") else self._field
                return start + field + rest
        return line


def _model_of(body: bytes) -> str:
    """The model that a request names; empty where it names none, or is none: the application says what is wrong."""
    try:
        model = parse_body(body).get("model")
    except QwedgeError:
        return ""
    return model if isinstance(model, str) else ""


def _read_key(settings: UpstreamSettings) -> str:
    assert settings.key_file is not None
    path = find_secret(settings.key_file)
    hint = "key_file names a file whose first line is the key"
    try:
        with path.open(encoding="ascii") as file:
            key = file.readline(4096).strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"the key of the upstream {settings.name} cannot be read from {path}", hint=hint) from None
    if not key or not key.isprintable():
        raise ConfigError(f"{path} holds no key", hint=hint)
    return key
