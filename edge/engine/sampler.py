"""From logits to the next token id, on numpy alone.

The order of the steps is the grammar's mask, logit bias, penalties, temperature, top_k, top_p, min_p: the penalties as
vLLM applies them [1], the filters as the logits warpers of transformers [2]. A filter sees only what the one before it
left over, with the probabilities renormalised.

A vocabulary has 150,000 entries and a decode step of a small model takes about 20 ms, so nothing here sorts it or
copies it to float64: top_k finds its candidates by the maxima of groups, top_p sorts only the tokens near the cut.

[1] https://github.com/vllm-project/vllm/blob/main/vllm/v1/sample/sampler.py
[2] https://github.com/huggingface/transformers/blob/main/src/transformers/generation/logits_process.py
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge.engine.logprobs import TokenLogprobs, token_logprobs, top_k
from edge.engine.thinking import TokenMask
from edge.errors import EngineError, RequestError

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them only overflows."""
MAX_LOGIT_BIAS_ENTRIES = 1024
_BLOCK = 64
_LIKELY_FLOOR = 1e-3  # the cut of a confident model lies among the weights above this
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_INT_BOUNDS: Mapping[str, tuple[int, int]] = {"top_k": (0, 2**20), "seed": (-(2**63), 2**63 - 1)}
_BIAS_BOUND = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the defaults are greedy decoding.

    Raises:
        RequestError: a field is out of its range or of the wrong type; ``param`` names it.
    """

    temperature: float = 0.0
    """0 to 2; 0 takes the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens that together reach this probability, at least one."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token in the prompt or the output."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time it is in the output."""
    seed: int | None = None
    """The same seed gives the same tokens; None draws fresh entropy."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to a value from -100 to 100 that is added to its logit."""

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            _check_number(name, getattr(self, name), low, high)
        for name, (first, last) in _INT_BOUNDS.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not isinstance(value, int):
                raise RequestError(f"{name} must be an integer", hint=f"use {first} to {last}", param=name)
            _check_number(name, value, first, last)
        self._check_bias()

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken and nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    def _check_bias(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS_ENTRIES:
            hint = f"use at most {MAX_LOGIT_BIAS_ENTRIES}"
            raise RequestError(f"logit_bias has {len(self.logit_bias)} entries", hint=hint, param="logit_bias")
        for token_id, bias in self.logit_bias.items():
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                hint = "use the ids of tokens of this model"
                raise RequestError("logit_bias names something that is no token id", hint=hint, param="logit_bias")
            _check_number("logit_bias", bias, -_BIAS_BOUND, _BIAS_BOUND)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    # Written so that NaN fails too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        hint = f"use a number from {low:g} to {high:g}"
        raise RequestError(f"{name} is out of range or not a number", hint=hint, param=name)


class Sampler:
    """Chooses the tokens of one sequence.

    Not thread-safe; the engine's thread owns it. Holds one float32 row of the vocabulary as scratch space.

    Args:
        params: how to choose.
        prompt_ids: the prompt, which the repetition penalty counts in.
        vocab_size: number of real token ids; logits at and beyond it are padding and never chosen.
        constraint: keeps the answer inside a grammar, or thoughts inside their budget.
        num_logprobs: alternatives to record with the log-probability of each token; None records nothing.

    Raises:
        RequestError: ``logit_bias`` names an id that the vocabulary does not have.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        *,
        constraint: TokenMask | None = None,
        num_logprobs: int | None = None,
    ) -> None:
        if max(params.logit_bias, default=0) >= vocab_size:
            hint = f"use ids below {vocab_size}"
            raise RequestError("logit_bias names an id beyond the vocabulary", hint=hint, param="logit_bias")
        self._params = params
        self._vocab_size = vocab_size
        self._rng = np.random.Generator(np.random.PCG64(None if params.seed is None else params.seed % 2**64))
        self._bias = _Bias(params.logit_bias) if params.logit_bias else None
        self._penalties = _Penalties(params, prompt_ids, vocab_size) if _penalises(params) else None
        self._constraint = constraint
        self._num_logprobs = num_logprobs
        self._logprobs: deque[TokenLogprobs] = deque()  # as many as tokens were sampled and not told yet: one step's
        copies = constraint is None and (self._bias is not None or self._penalties is not None)
        self._scratch = np.empty(vocab_size if copies or not params.greedy else 0, np.float32)

    def take_logprobs(self) -> TokenLogprobs | None:
        """Log-probabilities of the first sampled token whose own were not taken yet, where they are recorded."""
        return self._logprobs.popleft() if self._logprobs else None

    def prepare(self) -> None:
        """Called before the forward pass whose logits :meth:`sample` will get: what can be done meanwhile begins."""
        if self._constraint is not None:
            self._constraint.prepare()

    def forced_tokens(self) -> list[int]:
        """Tokens that a grammar prescribes next; changes nothing."""
        return [] if self._constraint is None else self._constraint.forced_tokens()

    def sample(self, logits: Floats) -> int:
        """Choose the next token, count it for the penalties and follow it in the grammar.

        Args:
            logits: [padded_vocab] of one position; left as it is. ``-inf`` marks a forbidden token.

        Returns:
            A token id below ``vocab_size``.

        Raises:
            EngineError: a logit is NaN or positive infinity, or every token is forbidden.
            RequestError: going on exceeds the limits of the grammar.
        """
        # Extreme logits may overflow to infinity on the way; both ends are handled.
        with np.errstate(over="ignore"):
            adjusted = self._adjust(logits[: self._vocab_size])
            best = int(adjusted.argmax())  # the first NaN, where there is one
            if not math.isfinite(adjusted[best]):
                raise EngineError("the model produced logits that are not finite", hint="verify the bundle and retry")
            chosen = best if self._params.greedy else self._draw(adjusted, adjusted[best])
        if self._num_logprobs is not None:
            self._logprobs.append(token_logprobs(logits[: self._vocab_size], chosen, self._num_logprobs))
        if self._penalties is not None:
            self._penalties.count(chosen)
        if self._constraint is not None:
            self._constraint.accept(chosen)
        return chosen

    def _adjust(self, logits: Floats) -> Floats:
        if self._constraint is not None:
            logits = self._constraint.mask(logits)
        elif self._bias is not None or self._penalties is not None:
            np.copyto(self._scratch, logits)
            logits = self._scratch
        if self._bias is not None:
            self._bias.apply(logits)
        if self._penalties is not None:
            self._penalties.apply(logits)
        return logits

    def _draw(self, logits: Floats, peak: np.float32) -> int:
        params = self._params
        ids: Ids | None = None
        if 0 < params.top_k < self._vocab_size:
            ids = top_k(logits, params.top_k)
            logits = logits[ids]
        # Unnormalised probabilities: the most probable token has 1.
        weights = np.subtract(logits, peak, out=self._scratch[: logits.size])
        weights /= np.float32(params.temperature)
        np.exp(weights, out=weights)
        kept = _filter(weights, params.top_p, params.min_p)
        if kept is not None:
            weights = weights[kept]
            ids = kept if ids is None else ids[kept]
        position = _pick(weights, self._rng)
        return position if ids is None else int(ids[position])


class _Bias:
    """The logit bias of a request as arrays."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = np.fromiter(bias.keys(), np.intp, len(bias))
        self._values = np.fromiter(bias.values(), np.float32, len(bias))

    def apply(self, logits: Floats) -> None:
        logits[self._ids] += self._values


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class _Penalties:
    """Which ids occurred and how often, and what that costs them; touches only those ids."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self._params = params
        in_prompt = sorted({i for i in prompt_ids if i < vocab_size}) if params.repetition_penalty != 1.0 else []
        self._row_of = {token_id: row for row, token_id in enumerate(in_prompt)}
        self._ids = np.array(in_prompt, np.intp)
        self._counts = np.zeros(len(in_prompt), np.float32)  # occurrences in the output

    def count(self, token_id: int) -> None:
        row = self._row_of.setdefault(token_id, len(self._row_of))
        if row == self._ids.size:
            self._grow()
        self._ids[row] = token_id
        self._counts[row] += 1

    def apply(self, logits: Floats) -> None:
        used = len(self._row_of)
        ids, counts = self._ids[:used], self._counts[:used]
        values = logits[ids]
        factor = np.float32(self._params.repetition_penalty)
        values = np.where(values > 0, values / factor, values * factor)
        values -= np.float32(self._params.frequency_penalty) * counts
        values -= np.float32(self._params.presence_penalty) * (counts > 0)
        logits[ids] = values

    def _grow(self) -> None:
        spare = max(64, self._ids.size)
        self._ids = np.concatenate([self._ids, np.zeros(spare, np.intp)])
        self._counts = np.concatenate([self._counts, np.zeros(spare, np.float32)])


def _filter(weights: Floats, top_p: float, min_p: float) -> Ids | None:
    """Positions that top_p and min_p keep, or None for all of them.

    Args:
        weights: unnormalised probabilities, the largest 1.
        top_p: share of the whole mass to keep.
        min_p: share of the largest weight to keep.
    """
    if top_p >= 1.0:
        return np.flatnonzero(weights >= np.float32(min_p)) if min_p > 0.0 else None
    total = float(weights.sum())
    # Everything below this bound adds up to less than what top_p leaves out, so the cut is above it.
    bound = (1.0 - top_p) * total / weights.size
    for likely in (_LIKELY_FLOOR, 0.0):
        reaches = weights >= np.float32(max(likely, bound, min_p))
        candidates = weights[reaches]
        if candidates.sum() >= top_p * total:
            break
    return np.flatnonzero(reaches)[_nucleus(candidates, top_p * total)]


def _nucleus(weights: Floats, mass: float) -> Ids:
    """Positions of the fewest largest weights whose sum reaches ``mass``; all of them where it never does.

    Positive floats are ordered like their bits, so the upper bits are a histogram with 32 bins to the octave: it
    shows the bin that holds the cut, and only that bin is sorted.
    """
    bins = weights.view(np.int32) >> 18
    # bincount converts by itself, but seven times slower.
    mass_of = np.bincount(bins.astype(np.intp), weights.astype(np.float64))
    from_top = np.cumsum(mass_of[::-1])  # mass of a bin and those above it
    passed = int(np.searchsorted(from_top, mass))
    if passed == from_top.size:
        return np.arange(weights.size)
    edge_bin = from_top.size - 1 - passed
    edge = np.flatnonzero(bins == edge_bin)
    edge = edge[np.argsort(-weights[edge], kind="stable")]
    missing = mass - (from_top[passed - 1] if passed else 0.0)
    num_needed = int(np.searchsorted(np.cumsum(weights[edge], dtype=np.float64), missing)) + 1
    return np.concatenate([np.flatnonzero(bins > edge_bin), edge[:num_needed]])


def _pick(weights: Floats, rng: np.random.Generator) -> int:
    """Draw a position with probability proportional to its weight: first a block of weights, then one in it."""
    starts = np.arange(0, weights.size, _BLOCK)
    start = int(starts[_invert(np.add.reduceat(weights, starts), rng.random())])
    return start + _invert(weights[start : start + _BLOCK], rng.random())


def _invert(weights: Floats, uniform: float) -> int:
    """The position at which the cumulated weights pass ``uniform`` (0 to 1) of their sum; never one of weight 0."""
    cumulated = np.cumsum(weights, dtype=np.float64)
    position = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    # Rounding may put the product on the sum itself: the last position that has a weight is meant then.
    return min(position, int(np.searchsorted(cumulated, cumulated[-1])))
