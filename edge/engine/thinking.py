"""Thinking first: up to so many tokens between ``<think>`` and ``</think>``, and a grammar for what follows.

A budget is exact: where the thoughts have used it up, ``</think>`` is the only token left. No index of the vocabulary
is needed for that, as a grammar would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
OPENING, CLOSING = "<think>\n", "</think>"
_OPENING_TAG, _CLOSING_TAG = b"<think>", b"</think>"
_GAP = b"\n\n"
"""What models write between their thoughts and the answer."""


@dataclass(frozen=True)
class Thinking:
    """How an answer thinks before it comes to the point."""

    opening: Literal["given", "forced", "free"]
    """Whether the prompt ends inside the ``<think>`` block; or the answer must begin with one; or may."""
    budget: int | None = None
    """Most tokens inside of the block; None = no limit."""


class Vocabulary(Protocol):
    """What thinking needs to know of a tokenizer; :class:`edge.tokenizer.Tokenizer` does."""

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token."""
        ...

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text."""
        ...


class TokenMask(Protocol):
    """Says which tokens may come next; not thread-safe, the engine's thread owns it."""

    def mask(self, logits: Floats) -> Floats:
        """A copy of ``logits`` [vocab_size] with ``-inf`` for what may not come next; the caller's until the next."""
        ...

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token, which :meth:`mask` has allowed."""
        ...

    def forced_tokens(self) -> list[int]:
        """Tokens that are prescribed next; changes nothing."""
        ...

    def prepare(self) -> None:
        """Begin with what the next mask needs, if that takes long."""
        ...


class ThoughtsFirst:
    """A mask that holds thoughts to their budget, and leaves what follows to another one.

    Args:
        thinking: how to think.
        vocabulary: the tokens.
        eos_ids: tokens that end an answer; thoughts that a form must follow cannot be the end.
        then: makes a mask for what follows; None leaves it free.
    """

    def __init__(
        self,
        thinking: Thinking,
        vocabulary: Vocabulary,
        eos_ids: frozenset[int],
        then: Callable[[], TokenMask] | None,
    ) -> None:
        self._vocabulary = vocabulary
        self._new_then = then
        self._then = None if then is None else then()
        self._eos_ids = list(eos_ids)
        self._left = thinking.budget
        self._phase: Literal["start", "thoughts", "gap", "answer"] = (
            "start" if thinking.opening == "free" else "thoughts"
        )
        self._forced = deque(self._ids(OPENING) if thinking.opening == "forced" else ())
        self._text = b""  # of the current phase; in thoughts the end of it
        self._scratch: Floats | None = None
        if self._phase == "thoughts" and not self._forced:
            self._spend(0)

    def mask(self, logits: Floats) -> Floats:
        """See :class:`TokenMask`."""
        if self._phase in {"start", "answer"} and self._then is not None:
            return self._then.mask(logits)
        if self._scratch is None:
            self._scratch = np.empty_like(logits)
        if self._forced:
            self._scratch.fill(-np.inf)
            self._scratch[self._forced[0]] = logits[self._forced[0]]
        else:
            np.copyto(self._scratch, logits)
            if self._then is not None:
                self._scratch[self._eos_ids] = -np.inf
        return self._scratch

    def accept(self, token_id: int) -> None:
        """See :class:`TokenMask`."""
        if self._phase in {"start", "answer"} and self._then is not None:
            self._then.accept(token_id)
        if self._phase == "answer":
            return
        was_forced = bool(self._forced)
        if was_forced:
            self._forced.popleft()
        self._text += self._vocabulary.token_bytes(token_id)
        if self._phase == "start":
            self._begin()
        elif self._phase == "gap":
            self._leave_gap()
        elif not self._close() and not self._forced:
            self._spend(0 if was_forced else 1)

    def forced_tokens(self) -> list[int]:
        """See :class:`TokenMask`."""
        if self._phase in {"start", "answer"}:
            return [] if self._then is None else self._then.forced_tokens()
        return list(self._forced)

    def prepare(self) -> None:
        """See :class:`TokenMask`."""
        if self._phase in {"start", "answer"} and self._then is not None:
            self._then.prepare()

    def _begin(self) -> None:
        """See whether the answer begins with a ``<think>`` block; until then it is held to the form."""
        text = self._text.lstrip()
        if text.startswith(_OPENING_TAG):
            self._phase, self._text = "thoughts", text.removeprefix(_OPENING_TAG)
            self._then = None if self._new_then is None else self._new_then()
            self._spend(0)
        elif not _OPENING_TAG.startswith(text):
            self._phase = "answer"

    def _spend(self, num_tokens: int) -> None:
        if self._left is not None:
            self._left -= num_tokens
            if self._left <= 0:
                self._forced.extend(self._ids(CLOSING))

    def _close(self) -> bool:
        """Whether the thoughts have ended with this token."""
        _, found, rest = self._text.rpartition(_CLOSING_TAG)
        if not found:
            self._text = self._text[-len(_CLOSING_TAG) :]
            return False
        self._forced.clear()
        self._phase, self._text = "gap", rest
        self._leave_gap()
        return True

    def _leave_gap(self) -> None:
        """Before a form, the line breaks that models write; they are not part of it."""
        missing = _GAP.removeprefix(self._text) if _GAP.startswith(self._text) else b""
        if self._then is None or not missing:
            self._phase = "answer"
        elif not self._forced:
            self._forced.extend(self._ids(missing.decode()))

    def _ids(self, text: str) -> Sequence[int]:
        return self._vocabulary.encode(text, special=False)
