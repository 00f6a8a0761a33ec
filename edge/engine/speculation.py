"""Speculation without a draft model: guess the next tokens from the text so far, verify them in one step.

Appending several tokens costs little more than appending one, since a step's time goes into reading the weights. So if
the last tokens occurred before, what followed them then is a good guess for now (prompt lookup decoding, Saxena 2023):
code edits, extractions and summaries copy much of their input.

Guesses change the speed only. The scheduler samples each position from the model's own logits and keeps a guess only
while it equals the sampled token, so every token is drawn exactly as it would be without guessing.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_DRAFT = 15
"""Most tokens guessed at once: a verification then appends 16."""
_NGRAM = 3
"""Tokens that have to occur again before what followed them is worth guessing."""
_RATE_WEIGHT = 0.15
"""Weight of the newest guess in the running acceptance rate."""
_TIME_WEIGHT = 0.1
"""Weight of the newest step in the running step times."""
_START_RATE = 0.6
_RECOVERY = 0.01
_START_COST_PER_TOKEN = 0.12
"""A first idea of what each further token adds to a step, in steps of one token; measured from then on."""


class PromptLookup:
    """Finds the latest earlier occurrence of a sequence's last tokens.

    Args:
        prompt: the prompt's token ids.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its latest occurrence
        self.extend(prompt)

    def __len__(self) -> int:
        """Tokens known."""
        return len(self._ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens."""
        for token in ids:
            # The n-gram before this token is entered only now that something follows it.
            if len(self._ids) >= _NGRAM:
                self._follows[tuple(self._ids[-_NGRAM:])] = len(self._ids)
            self._ids.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may come next; empty without a precedent."""
        start = self._follows.get(tuple(self._ids[-_NGRAM:]))
        return [] if start is None else self._ids[start : start + most]


class DraftLength:
    """How many tokens to guess so that it pays, from what guesses and steps have cost so far.

    With acceptance rate r, guessing k tokens yields 1 + r + ... + r^k tokens for the price of a step of k + 1; the best
    k may be 0. Prices are measured on this device while it works, so no table has to fit every processor.

    Args:
        most: upper bound; 0 never guesses.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._rate = _START_RATE
        self._step_s: dict[int, float] = {}

    def best(self) -> int:
        """The number of tokens to guess now."""
        best = max(range(self._most + 1), key=self._tokens_per_cost)
        if best == 0:
            # Without guesses nothing would ever be learned again: regain confidence, slowly.
            self._rate += _RECOVERY * (_START_RATE - self._rate)
        return best

    def took(self, num_tokens: int, seconds: float) -> None:
        """A step that appended ``num_tokens`` took that long."""
        known = self._step_s.get(num_tokens, seconds)
        self._step_s[num_tokens] = known + _TIME_WEIGHT * (seconds - known)

    def guessed(self, num_guessed: int, num_right: int) -> None:
        """So many tokens were guessed, and so many of them were right before the first wrong one."""
        for outcome in [1.0] * num_right + [0.0] * (num_right < num_guessed):
            self._rate += _RATE_WEIGHT * (outcome - self._rate)

    def _tokens_per_cost(self, guesses: int) -> float:
        expected = sum(self._rate**i for i in range(guesses + 1))
        return expected / self._cost(guesses + 1)

    def _cost(self, num_tokens: int) -> float:
        """Price of a step in steps of one token: measured, or interpolated from what was measured."""
        single = self._step_s.get(1)
        if single is None or num_tokens == 1:
            return 1 + _START_COST_PER_TOKEN * (num_tokens - 1)
        if num_tokens in self._step_s:
            return self._step_s[num_tokens] / single
        nearest = min((n for n in self._step_s if n > 1), key=lambda n: abs(n - num_tokens), default=None)
        if nearest is None:
            return 1 + _START_COST_PER_TOKEN * (num_tokens - 1)
        per_token = max(0.0, self._step_s[nearest] / single - 1) / (nearest - 1)
        return 1 + per_token * (num_tokens - 1)
