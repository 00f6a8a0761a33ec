"""OpenAI's wire format, shared by HTTP and MQTT.

The way of a request: :func:`parse_body` reads the bytes, :func:`parse_chat` or :func:`parse_completion` checks them,
:func:`prepare` makes a :class:`~edge.service.GenerationRequest` for each choice of the response. The events of all go
into one :class:`Answer`, which gives the chunks of a stream and the complete body. Errors of every kind become
:func:`error_body`.

    request = parse_chat(parse_body(payload))
    generations = prepare(model, request)
    answer = Answer(model, request, generations)
    async for index, event in events(service, generations):
        chunks = answer.chunks(index, event)
    body = answer.body()
"""

from edge.openai.answer import Answer, error_body
from edge.openai.body import parse_body, parse_json
from edge.openai.prepare import prepare
from edge.openai.schemas import ChatRequest, CompletionRequest, parse_chat, parse_completion

__all__ = [
    "Answer",
    "ChatRequest",
    "CompletionRequest",
    "error_body",
    "parse_body",
    "parse_chat",
    "parse_completion",
    "parse_json",
    "prepare",
]
