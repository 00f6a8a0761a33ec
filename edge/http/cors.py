"""Which other web sites may use the server from a browser: none, but for those that the operator names.

Fetch, section 3.2: https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

_PREFLIGHT: Final = {
    "access-control-allow-methods": "GET, POST, DELETE",
    "access-control-max-age": "600",
}
_READABLE: Final = "x-request-id, retry-after, idempotent-replayed, x-qwedge-upstream"
"""Response headers that a page may read beside the harmless ones."""


class Cors:
    """The origins that are allowed.

    Args:
        origins: as browsers send them: ``https://hmi.plant.example``.
    """

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origins)

    def allows(self, origin: str | None) -> bool:
        """Whether pages of this origin may use the server."""
        return origin in self._origins

    def preflight(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a browser that asks before it sends a request; None for anything else.

        It comes without a key: browsers send none with the question.
        """
        asks = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if not asks or not self.allows(headers.get("origin")):
            return None
        wanted = headers.get("access-control-request-headers", "")
        return Response(status_code=204, headers={**_PREFLIGHT, "access-control-allow-headers": wanted})

    def headers(self, origin: str | None) -> dict[str, str]:
        """What every response has beside its own headers."""
        if not self._origins:
            return {}
        if not self.allows(origin):
            return {"vary": "origin"}
        assert origin is not None
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": _READABLE,
            "cross-origin-resource-policy": "cross-origin",
            "vary": "origin",
        }
