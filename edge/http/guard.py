"""What every request passes first: Host, Origin, key, the body limit, a request id, security headers.

A web page on another site must not drive a model on this machine. The Host allow-list stops DNS rebinding: a foreign
name that resolves to this address is refused. A plain IP address as Host is allowed: no rebinding produces it. The
Origin check stops cross-site POSTs, which browsers send even where they hide the answer.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.errors import QwedgeError, RequestError, TooLargeError
from edge.http.access import Access, is_free, is_queued
from edge.http.audit import MAX_PATH, AuditLog
from edge.http.caller import Exchange, begin_exchange
from edge.http.cors import Cors
from edge.http.errors import error_response
from edge.log_format import FIELDS
from edge.settings.server import ServerSettings

log = logging.getLogger(__name__)

_SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        # Where the browser knows it: no script, not even our own, can turn a text into HTML or code.
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
MAX_HEADERS = 100
"""Headers of a request."""
MAX_HEADER_BYTES = 1 << 14
"""Names and values of all headers."""
MAX_TARGET_BYTES = 1 << 12
"""Path and query."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        settings: allowed hosts, origins and the body limit.
        check_room: raises the refusal while the queue is full.
        access: who may do what; None: everybody anything.
        audit: notes every request but those for page and health; None: nothing does.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        *,
        check_room: Callable[[], None],
        access: Access | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        self._app = app
        self._access = access
        self._check_room = check_room
        self._audit = audit
        self._max_body_bytes = settings.max_body_bytes
        self._hosts = {host.lower() for host in (*settings.allowed_hosts, settings.host)}
        self._cors = Cors(settings.cors_origins)
        self._hsts_s = settings.hsts_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request and pass it on, or answer it with the error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = begin_exchange(scope, _request_id(headers.get("x-request-id")))
        response = _Response(send, exchange.id, self._headers(scope, headers.get("origin")))
        started_at = time.monotonic()
        try:
            await self._handle(scope, headers, receive, response)
        finally:
            seconds = time.monotonic() - started_at
            _log_request(scope, exchange, response.status, seconds)
            if self._audit is not None and not is_free(scope["method"], scope["path"]):
                self._audit.record(scope, exchange, response.status, seconds)

    async def _handle(self, scope: Scope, headers: Headers, receive: Receive, response: _Response) -> None:
        body = _LimitedBody(receive, self._max_body_bytes)
        try:
            self._check(scope, headers)
            app = self._cors.preflight(scope, headers)
            if app is None:
                self._admit(scope, headers)
                self._check_queue(scope, headers)
            await (app or self._app)(scope, body.receive, response.send)
        except QwedgeError as error:
            if response.status is not None:  # too late to say so: the connection ends without an end of the answer
                raise
            await error_response(error, scope)(scope, receive, response.send)
        except Exception:
            # Our own fault, whatever it is: the client still gets an answer in the shape of all errors.
            log.exception("%s failed", response.request_id)
            if response.status is not None:
                raise
            internal = QwedgeError("internal error", hint="see the server's log for this request id")
            await error_response(internal, scope)(scope, receive, response.send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        _check_size(scope)
        host = headers.get("host", "")
        if not self._is_allowed(_without_port(host)):
            hint = "use the device's address, or add the name to allowed_hosts in the [server] settings"
            raise RequestError("this Host header is not allowed", hint=hint)
        if scope["method"] not in {"GET", "HEAD"} and self._is_foreign(headers.get("origin"), host):
            hint = "call from a program or this page, or add the site to cors_origins in the [server] settings"
            raise RequestError("requests from other web sites are not allowed", hint=hint)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise too_large(self._max_body_bytes)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        if self._access is not None:
            scope["state"]["exchange"].caller = self._access.admit(scope, headers)

    def _check_queue(self, scope: Scope, headers: Headers) -> None:
        """Under overload refuse before a body is read, templated and tokenized; what is stored is answered anyway."""
        if is_queued(scope["method"], scope["path"]) and "idempotency-key" not in headers:
            self._check_room()

    def _headers(self, scope: Scope, origin: str | None) -> dict[str, str]:
        """What a response has beside its own headers."""
        hsts = {"strict-transport-security": f"max-age={self._hsts_s}"} if self._hsts_s else {}
        return _SECURITY_HEADERS | self._cors.headers(origin) | (hsts if scope["scheme"] == "https" else {})

    def _is_foreign(self, origin: str | None, host: str) -> bool:
        return origin is not None and origin.partition("://")[2] != host and not self._cors.allows(origin)

    def _is_allowed(self, host: str) -> bool:
        if host in self._hosts:
            return True
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
        return True


class _LimitedBody:
    """Counts the body while it arrives, whatever Content-Length says."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._num_bytes = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._limit:
            raise too_large(self._limit)
        return message


class _Response:
    """Adds the headers that every response has."""

    def __init__(self, send: Send, request_id: str, headers: Mapping[str, str]) -> None:
        self.status: int | None = None
        """None until the response has begun."""
        self.request_id = request_id
        self._headers = headers
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers.update(self._headers)
            headers.setdefault("cache-control", "no-cache" if "etag" in headers else "no-store")
            if self.status == HTTPStatus.UNAUTHORIZED:
                headers["www-authenticate"] = "Bearer"
        await self._send(message)


def _request_id(given: str | None) -> str:
    """The client's, if it can do no harm in a log."""
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _log_request(scope: Scope, exchange: Exchange, status: int | None, seconds: float) -> None:
    # The raw path is percent-encoded ASCII: it cannot forge log lines.
    path = scope["raw_path"][:MAX_PATH].decode("ascii", "replace")
    level = logging.INFO if scope["method"] == "POST" else logging.DEBUG
    fields = {
        "request_id": exchange.id,
        "key": exchange.caller.name or None,
        "method": scope["method"],
        "path": path,
        "status": status,
        "duration_s": round(seconds, 3),
    }
    key = f" key={exchange.caller.name}" if exchange.caller.name else ""
    text = "%s %s %s %s %.3f s%s"
    log.log(level, text, exchange.id, scope["method"], path, status, seconds, key, extra={FIELDS: fields})


def _check_size(scope: Scope) -> None:
    """h11 limits what it has to wait for; a head that comes at once is limited here."""
    num_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
    target = len(scope["raw_path"]) + len(scope["query_string"])
    if len(scope["headers"]) > MAX_HEADERS or num_bytes > MAX_HEADER_BYTES or target > MAX_TARGET_BYTES:
        hint = f"send {MAX_HEADERS} headers, {MAX_HEADER_BYTES} bytes of them and {MAX_TARGET_BYTES} of address at most"
        error = TooLargeError("the request's head is too large", hint=hint)
        error.status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        raise error


def too_large(limit: int) -> TooLargeError:
    """The error for a body over the limit."""
    return TooLargeError(
        f"the body is larger than {limit} bytes", hint="send less, or raise max_body_bytes in the [server] settings"
    )


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host).lower().rstrip(".")
