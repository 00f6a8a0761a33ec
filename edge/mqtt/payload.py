"""What the payload of a request asks for: JSON, or the prompt itself."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge.errors import RequestError, TooLargeError
from edge.model import Model
from edge.mqtt.messages import MAX_PAYLOAD_BYTES, parse_request
from edge.mqtt.packets import Incoming
from edge.openai import Answer, parse_chat, parse_completion, prepare
from edge.openai.embeddings import EmbeddingAnswer, parse_embedding, prepare_embedding
from edge.service import GenerationRequest


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, read from either kind of payload."""

    body: dict[str, Any]
    stream: bool
    deadline_s: float | None
    """Seconds from reception."""

    @property
    def fingerprint(self) -> bytes:
        """Equal for equal questions; deadline, attempt and streaming may differ between copies."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).digest()

    def prepare(self, model: Model) -> tuple[Answer | EmbeddingAnswer, Sequence[GenerationRequest]]:
        """What the service is to do, and what collects its answer: by what the body holds.

        Raises:
            RequestError: what :func:`edge.openai.parse_chat` and :func:`edge.openai.prepare` raise.
        """
        if "input" in self.body:
            wanted = parse_embedding(self.body)
            inputs = prepare_embedding(model, wanted)
            return EmbeddingAnswer(model, wanted, inputs), inputs
        request = parse_completion(self.body) if "prompt" in self.body else parse_chat(self.body)
        choices = prepare(model, request)
        return Answer(model, request, choices), choices


def read(message: Incoming, *, chat: bool) -> Wanted:
    """Read a payload: JSON where it begins with ``{``, else the prompt itself.

    Args:
        message: the request.
        chat: whether a bare prompt is the user's turn of a chat; else it is completed as it stands.

    Raises:
        TooLargeError: it is larger than :data:`MAX_PAYLOAD_BYTES`.
        RequestError: it is empty, malformed, or no UTF-8.
    """
    if message.payload is None:
        hint = "send a shorter prompt"
        raise TooLargeError(f"the request is larger than {MAX_PAYLOAD_BYTES} bytes", hint=hint)
    expiry_s = None if message.expiry_s is None else float(message.expiry_s)
    if is_plain(message.payload):
        text = _text(message.payload)
        body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        return Wanted(body, stream=False, deadline_s=expiry_s)
    request = parse_request(message.payload)
    stream = request.stream if request.stream is not None else request.body.get("stream") is True
    deadlines = [expiry_s, None if request.deadline_ms is None else request.deadline_ms / 1000]
    return Wanted(request.body, stream, min((d for d in deadlines if d is not None), default=None))


def is_plain(payload: bytes) -> bool:
    """Whether a payload is the prompt itself."""
    return not payload.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n").startswith(b"{")


def _text(payload: bytes) -> str:
    """A bare prompt; zeros at its end pad the fixed-length strings of PLCs."""
    hint = "send text or JSON in UTF-8"
    try:
        text = payload.rstrip(b"\0").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError("the prompt is not valid UTF-8", hint=hint) from None
    if "\0" in text:
        raise RequestError("the prompt is binary, not text", hint=hint)
    if not text.strip():
        raise RequestError("the prompt is empty", hint="send the prompt as the payload")
    return text
