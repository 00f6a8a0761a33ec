"""Anthropic's wire format, over :mod:`edge.openai`.

The way of a request: :func:`parse_messages` checks the body, :func:`to_chat` makes a chat request of it, for which
:func:`edge.openai.prepare` makes what the service generates; the events go into a :class:`MessageWriter`.
"""

from edge.anthropic.errors import error_body
from edge.anthropic.message import MessageWriter
from edge.anthropic.schemas import CountRequest, MessagesRequest, parse_count, parse_messages
from edge.anthropic.translate import to_chat

__all__ = [
    "CountRequest",
    "MessageWriter",
    "MessagesRequest",
    "error_body",
    "parse_count",
    "parse_messages",
    "to_chat",
]
