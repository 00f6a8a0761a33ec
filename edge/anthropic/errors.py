"""Anthropic's shape of an error."""

from __future__ import annotations

from typing import Any

from edge.errors import QwedgeError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: QwedgeError) -> dict[str, Any]:
    """Anthropic's error object, with ``code``, ``param`` and ``hint`` beside its fields.

    The hint stands in the message too, as it is all that most clients show.
    """
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    extras = {"code": error.code, "param": error.param, "hint": error.hint or None}
    return {"type": "error", "error": {"type": kind, "message": str(error), **extras}}
