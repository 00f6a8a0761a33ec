"""Ollama's wire format."""

from edge.ollama.errors import error_body

__all__ = ["error_body"]
