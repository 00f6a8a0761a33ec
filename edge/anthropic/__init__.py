"""Anthropic's wire format."""

from edge.anthropic.errors import error_body

__all__ = ["error_body"]
