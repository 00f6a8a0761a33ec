"""Ollama's shape of an error."""

from __future__ import annotations

from typing import Any

from edge.errors import QwedgeError


def error_body(error: QwedgeError) -> dict[str, Any]:
    """Ollama's error object: the message, with the hint, as it is all that clients show; ``code`` beside it."""
    return {"error": str(error), "code": error.code}
