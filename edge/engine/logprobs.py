"""Log-probabilities of tokens, and the most probable tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge.errors import EngineError

Floats = NDArray[np.float32]

MAX_TOP = 20
"""Most alternatives that are reported."""
_GROUP = 64
_LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot carry; OpenAI's value."""


@dataclass(frozen=True)
class TokenLogprobs:
    """How probable a chosen token was, and what else was.

    The probabilities are the model's own: before a grammar, bias, penalties, temperature and filters change them.
    """

    token_id: int
    logprob: float
    """Natural logarithm."""
    top: tuple[tuple[int, float], ...]
    """Ids of the most probable tokens and their log-probabilities, the most probable first."""


def token_logprobs(logits: Floats, token_id: int, num_top: int) -> TokenLogprobs:
    """The log-probability of a token and of the ``num_top`` most probable ones, under ``logits`` [vocab_size].

    A token beyond the vocabulary is an impossible one.

    Raises:
        EngineError: a logit is NaN or positive infinity, or all are negative infinity.
    """
    peak = logits.max()
    if not np.isfinite(peak):
        raise EngineError("the model produced logits that are not finite", hint="verify the bundle and retry")
    with np.errstate(over="ignore"):  # extreme logits: their share is 0
        weights = np.exp(logits - peak)
    total = float(peak) + math.log(weights.sum(dtype=np.float64))

    def logprob(of: int) -> float:
        return max(float(logits[of]) - total, _LEAST) if of < logits.size else _LEAST

    ids = top_k(logits, num_top).tolist() if num_top else []
    return TokenLogprobs(token_id, logprob(token_id), tuple((top_id, logprob(top_id)) for top_id in ids))


class PromptScorer:
    """Collects the log-probabilities of a prompt's own tokens while the prompt is read.

    Not thread-safe; the engine's thread calls it.

    Args:
        prompt_ids: the prompt.
        vocab_size: number of real token ids; logits at and beyond it are padding.
        num_top: alternatives to collect with each token.
    """

    reads: Literal["logits"] = "logits"

    def __init__(self, prompt_ids: Sequence[int], vocab_size: int, num_top: int) -> None:
        self._prompt_ids = prompt_ids
        self._vocab_size = vocab_size
        self._num_top = num_top
        self._scores: list[TokenLogprobs] = []

    @property
    def scores(self) -> tuple[TokenLogprobs, ...]:
        """Of the tokens read so far but the first, which nothing predicts; in the prompt's order."""
        return tuple(self._scores)

    def __call__(self, start: int, logits: Floats) -> None:
        """Take what the model expects after some tokens of the prompt; chunks come in order.

        Args:
            start: position of the first of these tokens. A prompt that is read again begins again with 0.
            logits: [n, padded_vocab] after the tokens ``start`` to ``start + n - 1``.

        Raises:
            EngineError: a logit is NaN or positive infinity, or all are negative infinity.
        """
        del self._scores[start:]
        predicted = self._prompt_ids[start + 1 : start + 1 + len(logits)]  # one less than logits at the prompt's end
        for token_id, row in zip(predicted, logits, strict=False):
            self._scores.append(token_logprobs(row[: self._vocab_size], token_id, self._num_top))


def top_k(logits: Floats, k: int) -> NDArray[np.intp]:
    """Ids of the k largest logits; of equal ones the lower id wins.

    The k-th largest of the maxima of disjoint groups is a lower bound of the k-th largest logit, and few logits lie
    above it: two passes of vector instructions replace the selection from the whole vocabulary.
    """
    columns = logits.size // _GROUP
    maxima = logits[: _GROUP * columns].reshape(_GROUP, columns).max(axis=0)
    maxima = np.concatenate([maxima, logits[_GROUP * columns :]])
    floor = np.partition(maxima if k <= maxima.size else logits, -k)[-k]
    candidates = np.flatnonzero(logits >= floor)
    return candidates[np.argsort(-logits[candidates], kind="stable")[:k]]
