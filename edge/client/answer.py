"""Reading answers: their text, put together from pieces, and the error that a failure stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.client.wire import Ended, Text
from edge.errors import (
    CancelledError,
    ConflictError,
    DeadlineError,
    EngineError,
    ModelNotFoundError,
    OverloadedError,
    QwedgeError,
    RequestError,
    TooLargeError,
    UnavailableError,
)

_ERRORS: dict[int, type[QwedgeError]] = {
    error.status: error
    for error in (
        RequestError, ModelNotFoundError, DeadlineError, ConflictError, TooLargeError, OverloadedError, CancelledError,
        EngineError, UnavailableError,
    )
}  # fmt: skip


class AnswerChangedError(QwedgeError):
    """Part of an answer had been handed on when it was lost, and the request was answered anew, with another text."""

    code = "answer_changed"
    retryable = True


class Assembler:
    """Hands on the text of an answer, each character once.

    Pieces that come in their order are handed on at once. After the first one that does not (a lost or repeated
    piece, a request that was run again) all further text comes from the whole answer.
    """

    def __init__(self) -> None:
        self._text = ""
        self._next = 0
        self._in_order = True

    def take(self, piece: Text) -> str:
        """What a piece adds."""
        self._in_order = self._in_order and piece.seq == self._next
        if not self._in_order:
            return ""
        self._next += 1
        self._text += piece.text
        return piece.text

    def rest(self, whole: str) -> str:
        """What the whole answer adds.

        Raises:
            AnswerChangedError: it does not begin with what was handed on.
        """
        if not whole.startswith(self._text):
            hint = "ask again; the stream's `answer` is the whole new answer"
            raise AnswerChangedError("the answer was lost half-way, and the next one reads differently", hint=hint)
        return whole[len(self._text) :]


def text_of(body: Mapping[str, Any]) -> str:
    """The text of the first choice; empty where there is none, as in calls of tools."""
    choice = body["choices"][0]
    return str((choice["message"]["content"] if "message" in choice else choice["text"]) or "")


def error_of(ended: Ended) -> QwedgeError:
    """The error that an outcome other than 200 stands for."""
    error = ended.body.get("error")
    told: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    kind = _ERRORS.get(ended.status, RequestError if ended.status < 500 else EngineError)
    message = str(told.get("message") or f"the request failed with status {ended.status}")
    param = told.get("param")
    return kind(
        message,
        hint=str(told.get("hint") or ""),
        param=None if param is None else str(param),
        retry_after_s=ended.retry_after_s,
    )
