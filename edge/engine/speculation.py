"""Speculation without a draft model: guess the next tokens from the text so far, verify them in one step.

Appending several tokens costs little more than appending one, since a step's time goes into reading the weights. So if
the last tokens occurred before, what followed them then is a good guess for now (prompt lookup decoding, Saxena 2023):
code edits, extractions and summaries copy much of their input. Tokens that a grammar prescribes are guesses too, and
the best ones.

Guesses change the speed only. The scheduler samples each position from the model's own logits and keeps a guess only
while it equals the sampled token, so every token is drawn exactly as it would be without guessing; and the engine
computes a guessed token to the last bit as it computes it alone (``edge.engine.kv_cache``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

_NGRAMS = (4, 3, 2, 1)
"""Lengths of the beginnings that are looked up, the most telling first."""
_NEXT = 0
"""The rate of guesses that go on where the one before was right; others are rates of the n-gram that was found."""
_START_RATES = {_NEXT: 0.85, 4: 0.7, 3: 0.5, 2: 0.3, 1: 0.2}
"""How often a guess is right, before anything is known of a sequence."""
_FORCED_RATE = 0.97
"""How often the model takes the very tokens that its grammar prescribes, and not others for the same characters."""
_RATE_WEIGHT = 0.1
"""Weight of the newest outcome in the running rates."""
_TIME_WEIGHT = 0.1
"""Weight of the newest step in the running step times."""
_FORGET = 0.002
"""Weight of what a step's time says about steps of other sizes."""
_MOST_SLOWER = 4
"""A step that took longer than so many of its kind was held up by something else."""
_COST_PER_ROW = 0.25
"""A first idea of what each further token adds to a step, in steps of one token; measured from then on."""


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next."""

    ids: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()
    """Of each token: the probability that it and all before it are right. They fall."""


class PromptLookup:
    """Follows what came after the latest earlier occurrence of a sequence's last tokens.

    There is a guess for the next token whenever there is a precedent, and every token that comes is compared with it,
    whether the guess was verified or not: so it is known at any time how far guesses can be trusted.

    Args:
        prompt: the prompt's token ids.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its latest occurrence
        self._rates = dict(_START_RATES)
        for token in prompt:
            self._append(token)
        self._guess: int | None = None  # index of the token that is expected next
        self._source = _NEXT
        self._look_up()

    def __len__(self) -> int:
        """Tokens known."""
        return len(self._ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens, and learn how right their guesses were."""
        for token in ids:
            if is_guessed := self._guess is not None:
                is_right = self._ids[self._guess] == token
                self._rates[self._source] += _RATE_WEIGHT * (is_right - self._rates[self._source])
            self._append(token)
            if self._guess is not None and is_guessed and is_right:
                self._guess += 1
                self._source = _NEXT
            else:
                self._look_up()

    def draft(self, most: int, forced: Sequence[int] = ()) -> Draft:
        """Up to ``most`` tokens that may come next: those that are forced, and what followed the like before."""
        known = tuple(forced[:most])
        start, source = self._find((*self._ids[-_NGRAMS[0] :], *known)) if known else (self._guess, self._source)
        found = () if start is None else tuple(self._ids[start : start + most - len(known)])
        rates = [_FORCED_RATE] * len(known) + [self._rates[source]] + [self._rates[_NEXT]] * len(found)
        return Draft(known + found, tuple(accumulate(rates[: len(known + found)], operator.mul)))

    def _append(self, token: int) -> None:
        # The n-grams before this token are entered only now that something follows them.
        for n in _NGRAMS:
            if len(self._ids) >= n:
                self._follows[tuple(self._ids[-n:])] = len(self._ids)
        self._ids.append(token)

    def _look_up(self) -> None:
        self._guess, self._source = self._find(tuple(self._ids[-_NGRAMS[0] :]))

    def _find(self, tail: tuple[int, ...]) -> tuple[int | None, int]:
        """Where what followed a beginning before goes on, and by which n-gram it was found."""
        for n in _NGRAMS:
            start = self._follows.get(tail[-n:])
            if start is not None:
                return start, n
        return None, _NEXT


class StepCosts:
    """What decode steps of different sizes cost on this device, measured while it works."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def took(self, rows: int, seconds: float) -> None:
        """A step of so many rows took that long."""
        known = self._seconds.get(rows, seconds)
        seconds = min(seconds, _MOST_SLOWER * known)
        self._seconds[rows] = known + _TIME_WEIGHT * (seconds - known)
        for other in self._seconds:
            if other != rows:
                # One slow step must not rule a size out for ever.
                expected = seconds * _relative(other) / _relative(rows)
                self._seconds[other] += _FORGET * (expected - self._seconds[other])

    def of(self, rows: int) -> float:
        """Seconds of a step of so many rows: measured, or made from the nearest size that was."""
        if not self._seconds:
            return _relative(rows)
        nearest = min(self._seconds, key=lambda known: abs(known - rows))
        return self._seconds[nearest] * _relative(rows) / _relative(nearest)


def share_out(
    chances: Sequence[Sequence[float]], num_certain: int, costs: StepCosts, most: int, *, all_or_again: bool = False
) -> list[int]:
    """How many tokens of each draft to verify, so that a second of work gives the most tokens.

    Args:
        chances: of the drafts.
        num_certain: rows that the step has anyway, each of which gives a token.
        costs: of steps.
        most: rows left for drafts.
        all_or_again: whether one wrong guess means that the step's tokens have to be computed again, beside the next
            one's; there is one draft at most then, and the step has an even number of rows.
    """
    # The likeliest tokens first; within a draft the order is kept, since chances fall.
    offers = sorted(((chance, i) for i, row in enumerate(chances) for chance in row), key=lambda offer: -offer[0])
    # Tokens that are computed again count as a gain, too: that makes those that have just been wrong more careful.
    best, best_rate, expected = 0, num_certain / costs.of(num_certain), float(num_certain)
    for taken, (chance, _) in enumerate(offers[:most], start=1):
        expected += chance
        seconds = costs.of(num_certain + taken)
        if all_or_again:
            seconds += (1 - chance) * (seconds - costs.of(1))
        rate = expected / seconds
        if rate > best_rate and not (all_or_again and (num_certain + taken) % 2):
            best, best_rate = taken, rate
    counts = [0] * len(chances)
    for _, i in offers[:best]:
        counts[i] += 1
    return counts


def _relative(rows: int) -> float:
    return 1 + _COST_PER_ROW * (rows - 1)
