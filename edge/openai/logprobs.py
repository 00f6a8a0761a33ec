"""Log-probabilities in OpenAI's two shapes: of chat, and of completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge.engine.logprobs import TokenLogprobs
from edge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Entry:
    """One token on the wire."""

    token: bytes
    """Raw: it may be a part of a character."""
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    text_offset: int
    """Characters of the answer before the token."""


class LogprobsWriter:
    """Turns tokens into entries, in the order of the answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def entry(self, logprobs: TokenLogprobs) -> Entry:
        """The entry of the next token."""
        raw = self._tokenizer.token_bytes
        token, offset = raw(logprobs.token_id), self._offset
        self._offset += len(self._decoder.decode(token))
        return Entry(token, logprobs.logprob, tuple((raw(i), value) for i, value in logprobs.top), offset)


def chat_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
    """``choices[].logprobs`` of chat."""
    content = [
        {**_token(entry.token, entry.logprob), "top_logprobs": [_token(*top) for top in entry.top]} for entry in entries
    ]
    return {"content": content, "refusal": None}


def text_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
    """``choices[].logprobs`` of completions."""
    return {
        "tokens": [_text(entry.token) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        # Parts of characters share one text; the most probable one is kept.
        "top_logprobs": [{_text(token): value for token, value in reversed(entry.top)} for entry in entries],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(token), "logprob": logprob, "bytes": list(token)}


def _text(token: bytes) -> str:
    return token.decode("utf-8", errors="replace")
