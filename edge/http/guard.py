"""What every request passes first: Host and Origin checks, the body limit, a request id, security headers.

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

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.errors import QwedgeError, RequestError, TooLargeError
from edge.http.caller import begin_exchange
from edge.http.errors import error_response
from edge.settings.server import ServerSettings

log = logging.getLogger(__name__)

_SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        settings: allowed hosts and the body limit.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._hosts = {host.lower() for host in (*settings.allowed_hosts, settings.host)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request and pass it on, or answer it with the error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        response = _Response(send, headers.get("x-request-id"))
        begin_exchange(scope, response.request_id)
        started_at = time.monotonic()
        try:
            await self._handle(scope, headers, receive, response)
        finally:
            _log_request(scope, response, time.monotonic() - started_at)

    async def _handle(self, scope: Scope, headers: Headers, receive: Receive, response: _Response) -> None:
        body = _LimitedBody(receive, self._max_body_bytes)
        try:
            self._check(scope, headers)
            await self._app(scope, body.receive, response.send)
        except QwedgeError as error:
            await error_response(error, scope)(scope, receive, response.send)
        except Exception:
            # Our own fault, whatever it is: the client still gets an answer in the shape of all errors.
            log.exception("%s failed", response.request_id)
            if response.status is not None:
                raise
            internal = QwedgeError("internal error", hint="see the server's log for this request id")
            await error_response(internal, scope)(scope, receive, response.send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_allowed(_without_port(host)):
            hint = "use the device's address, or add the name to allowed_hosts in the [server] settings"
            raise RequestError("this Host header is not allowed", hint=hint)
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in {"GET", "HEAD"} and origin.partition("://")[2] != host:
            raise RequestError("requests from other web sites are not allowed", hint="call from a program or this page")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise too_large(self._max_body_bytes)

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

    def __init__(self, send: Send, request_id: str | None) -> None:
        self.status: int | None = None
        """None until the response has begun."""
        self.request_id = request_id if request_id and _REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers.update(_SECURITY_HEADERS)
            headers.setdefault("cache-control", "no-cache" if "etag" in headers else "no-store")
        await self._send(message)


def _log_request(scope: Scope, response: _Response, seconds: float) -> None:
    # The raw path is percent-encoded ASCII: it cannot forge log lines.
    path = scope["raw_path"][:200].decode("ascii", "replace")
    level = logging.INFO if scope["method"] == "POST" else logging.DEBUG
    log.log(level, "%s %s %s %s %.3f s", response.request_id, scope["method"], path, response.status, seconds)


def too_large(limit: int) -> TooLargeError:
    """The error for a body over the limit."""
    return TooLargeError(
        f"the body is larger than {limit} bytes", hint="send less, or raise max_body_bytes in the [server] settings"
    )


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host).lower().rstrip(".")
