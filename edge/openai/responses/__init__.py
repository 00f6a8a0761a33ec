"""OpenAI's responses [1], without anything stored: the client sends the whole conversation each time.

A request is checked by :func:`parse_response` and becomes a chat (:func:`to_chat`), which
:func:`edge.openai.prepare` takes, inside of :func:`own_names`; the events go into a :class:`ResponseWriter`.

[1] https://platform.openai.com/docs/api-reference/responses
"""

from edge.openai.responses.schemas import ResponseRequest, parse_response
from edge.openai.responses.translate import own_names, to_chat
from edge.openai.responses.writer import ResponseWriter

__all__ = ["ResponseRequest", "ResponseWriter", "own_names", "parse_response", "to_chat"]
