"""Ollama's wire format, over :mod:`edge.openai`.

The way of a request: :func:`parse` checks the body, :func:`to_openai` makes a chat or a completion of it, for which
:func:`generation_of` makes what the service generates; the events go into a :class:`LineWriter`.
"""

from edge.ollama.describe import describe_entry, describe_loaded, describe_model
from edge.ollama.errors import error_body
from edge.ollama.lines import LineWriter, loaded
from edge.ollama.schemas import ChatBody, EmbedBody, EmbeddingsBody, GenerateBody, Named, ShowBody, parse
from edge.ollama.translate import generation_of, served_name, to_embedding, to_openai

__all__ = [
    "ChatBody",
    "EmbedBody",
    "EmbeddingsBody",
    "GenerateBody",
    "LineWriter",
    "Named",
    "ShowBody",
    "describe_entry",
    "describe_loaded",
    "describe_model",
    "error_body",
    "generation_of",
    "loaded",
    "parse",
    "served_name",
    "to_embedding",
    "to_openai",
]
