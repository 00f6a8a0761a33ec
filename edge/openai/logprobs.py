"""Log-probabilities in OpenAI's two shapes: of chat, and of completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edge.engine.logprobs import TokenLogprobs
from edge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Entry:
    """One token on the wire."""

    token: bytes
    """Raw: it may be a part of a character."""
    logprob: float | None
    """None for a prompt's first token, which nothing predicts."""
    top: tuple[tuple[bytes, float], ...]
    text_offset: int
    """Characters of the text before the token."""


class LogprobsWriter:
    """Turns tokens into entries, in the order of the text: those of an echoed prompt first, then the answer's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def prompt(self, first_id: int, logprobs: Sequence[TokenLogprobs]) -> Iterator[Entry]:
        """The entries of an echoed prompt: its first token, and all that follow it."""
        first = self._tokenizer.token_bytes(first_id)
        yield Entry(first, None, (), self._advance(first))
        for token in logprobs:
            raw = self._tokenizer.token_bytes(token.token_id)
            yield self._entry(token, raw, self._advance(raw))
        self._offset += len(self._decoder.decode(b"", final=True))  # no character goes on in the answer

    def answer(self, logprobs: TokenLogprobs) -> Entry:
        """The entry of the answer's next token; special tokens are no part of its text."""
        raw = self._tokenizer.token_bytes(logprobs.token_id)
        shown = b"" if logprobs.token_id in self._tokenizer.special_ids else raw
        return self._entry(logprobs, raw, self._advance(shown))

    def _advance(self, shown: bytes) -> int:
        offset = self._offset
        self._offset += len(self._decoder.decode(shown))
        return offset

    def _entry(self, logprobs: TokenLogprobs, raw: bytes, offset: int) -> Entry:
        top = tuple((self._tokenizer.token_bytes(token_id), value) for token_id, value in logprobs.top)
        return Entry(raw, logprobs.logprob, top, offset)


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
        "top_logprobs": [_by_text(entry) for entry in entries],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _by_text(entry: Entry) -> dict[str, float] | None:
    """The alternatives and the token itself, which may not be among them."""
    if entry.logprob is None:
        return None
    # Parts of characters share one text; the most probable one is kept.
    return {_text(token): value for token, value in ((entry.token, entry.logprob), *reversed(entry.top))}


def _token(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(token), "logprob": logprob, "bytes": list(token)}


def _text(token: bytes) -> str:
    return token.decode("utf-8", errors="replace")
