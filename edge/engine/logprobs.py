"""Log-probabilities of tokens, and the most probable tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    """The log-probability of a token and of the ``num_top`` most probable ones, under ``logits`` [vocab_size]."""
    peak = logits.max()
    with np.errstate(over="ignore"):  # extreme logits: their share is 0
        weights = np.exp(logits - peak)
    total = float(peak) + math.log(weights.sum(dtype=np.float64))

    def logprob(of: int) -> float:
        return max(float(logits[of]) - total, _LEAST)

    ids = top_k(logits, num_top).tolist() if num_top else []
    return TokenLogprobs(token_id, logprob(token_id), tuple((top_id, logprob(top_id)) for top_id in ids))


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
