"""One vector for a whole text: what the model has made of it, before the head."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge.errors import EngineError

Pooling = Literal["mean", "last"]
"""The mean of all tokens' hidden states, or the last token's."""


class Pooler:
    """Collects the hidden states of a prompt while the prompt is read.

    Not thread-safe; the engine's thread calls it.

    Args:
        pooling: which of them count.
    """

    reads: Literal["hidden"] = "hidden"

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._sum: NDArray[np.float64] = np.zeros(0)
        self._num_tokens = 0

    def __call__(self, start: int, hidden: NDArray[np.float32]) -> None:
        """Take the hidden states [n, hidden_size] of some tokens of the prompt; chunks come in order.

        Args:
            start: position of the first of these tokens. A prompt that is read again begins again with 0.
            hidden: valid during the call only.
        """
        if self._pooling == "last":
            self._sum, self._num_tokens = hidden[-1].astype(np.float64), 1
            return
        total = hidden.sum(axis=0, dtype=np.float64)
        self._sum = total if start == 0 else self._sum + total
        self._num_tokens = start + len(hidden)

    @property
    def vector(self) -> NDArray[np.float32]:
        """The pooled hidden states [hidden_size], as long as they come out; after the whole prompt was read.

        Raises:
            EngineError: they are not finite.
        """
        assert self._num_tokens, "nothing was read"
        vector = (self._sum / self._num_tokens).astype(np.float32)
        if not np.isfinite(vector).all():
            raise EngineError("the model produced hidden states that are not finite", hint="verify the bundle")
        return vector
