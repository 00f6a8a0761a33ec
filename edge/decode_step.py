"""What goes into one decode step: a token of every running sequence, and guesses where they pay."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge.engine.interface import Engine
from edge.engine.speculation import Draft, StepCosts, share_out
from edge.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class Share:
    """One sequence's part of a step."""

    sequence: Sequence
    known: tuple[int, ...]
    """Outputs that are to be appended: the last one; several where the slot was taken away for a while."""
    draft: Draft
    num_drafted: int
    """Tokens of the draft that are verified in this step."""
    past: int
    """Tokens of the sequence that are in its slot before the step."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens to append."""
        return self.known + self.draft.ids[: self.num_drafted]

    @property
    def is_complete(self) -> bool:
        """Whether the last output is among them, so that the next token can be sampled."""
        return self.past + len(self.known) == self.sequence.num_tokens


class Decoding:
    """Decode steps of an engine, and what is learned from them. The engine's thread only.

    Args:
        engine: runs them.
        draft_tokens: most tokens guessed in one step; 0 never guesses.
    """

    def __init__(self, engine: Engine, draft_tokens: int) -> None:
        self._engine = engine
        self._draft_tokens = draft_tokens
        self._costs = StepCosts()
        self.num_drafted = 0
        """Guessed tokens that were verified so far."""
        self.num_accepted = 0
        """Guessed tokens that were right so far."""

    def step(self, running: List[Sequence]) -> Iterator[tuple[Share, NDArray[np.float32]]]:
        """Append a token, or several, to each of the ``running`` sequences.

        Returns:
            Of each its share and the logits [len(share.ids), padded_vocab], which are valid until the next step.
        """
        shares = plan_step(
            running,
            rows=self._engine.rows,
            draft_tokens=self._draft_tokens,
            context_length=self._engine.context_length,
            costs=self._costs,
            has_states=self._engine.bytes_per_slot > 0,
        )
        slots: list[int] = []
        ids: list[int] = []
        past: list[int] = []
        for share in shares:
            slots += [share.sequence.slot] * len(share.ids)
            ids += share.ids
            past += range(share.past, share.past + len(share.ids))
            if share.is_complete:
                share.sequence.sampler.prepare()
        began = time.monotonic()
        logits = self._engine.decode(slots, ids, past)
        self._costs.took(len(ids), time.monotonic() - began)
        return zip(shares, _split(logits, shares), strict=True)

    def settle(self, share: Share, num_right: int) -> None:
        """After sampling: so many guesses were right, and ``num_computed_tokens`` counts them already."""
        sequence = share.sequence
        if num_right < share.num_drafted and sequence.status is not SequenceStatus.FINISHED:
            # A state that has seen a wrong guess is of no use: what was right is appended again, with the next token.
            kept = self._engine.kept_length(sequence.slot, sequence.num_computed_tokens)
            sequence.num_computed_tokens = kept
        self.num_drafted += share.num_drafted
        self.num_accepted += num_right


def plan_step(
    running: List[Sequence],
    *,
    rows: int,
    draft_tokens: int,
    context_length: int,
    costs: StepCosts,
    has_states: bool = False,
) -> list[Share]:
    """Share a step's rows out among the running sequences.

    Args:
        running: the sequences; each gets a row at least.
        rows: most tokens of the step.
        draft_tokens: most guesses of the step.
        context_length: tokens that a slot holds.
        costs: of steps, to see whether guessing pays.
        has_states: whether the model has layers of linear attention. Several tokens of a sequence are a step by
            themselves then, so that guessing pays for a sequence alone only; and they are an even number, since nothing
            can fill their step up (``edge.engine.recurrent_steps``).
    """
    spare = rows - len(running)
    known = []
    for sequence in running:
        known.append(tuple(sequence.pending_ids[: 1 + spare]))
        spare -= len(known[-1]) - 1
    most = 0 if has_states and len(running) > 1 else min(spare, draft_tokens)
    shares = [
        Share(sequence, ids, Draft(), 0, sequence.num_computed_tokens)
        for sequence, ids in zip(running, known, strict=True)
    ]
    if most <= 0:
        return [_with_even_number(share) for share in shares] if has_states else shares
    drafts = [
        share.sequence.draft(_room(share.sequence, most, context_length)) if share.is_complete else Draft()
        for share in shares
    ]
    num_known = sum(map(len, known))
    counts = share_out([draft.chances for draft in drafts], num_known, costs, most, all_or_again=has_states)
    shares = [
        Share(share.sequence, share.known, draft, count, share.past)
        for share, draft, count in zip(shares, drafts, counts, strict=True)
    ]
    return [_with_even_number(share) for share in shares] if has_states else shares


def _split(logits: NDArray[np.float32], shares: List[Share]) -> Iterator[NDArray[np.float32]]:
    """The rows of each share."""
    first = 0
    for share in shares:
        yield logits[first : first + len(share.ids)]
        first += len(share.ids)


def _with_even_number(share: Share) -> Share:
    """One token less, if there are several and their number is odd."""
    count = len(share.ids)
    if count == 1 or count % 2 == 0:
        return share
    if share.num_drafted:
        return replace(share, num_drafted=share.num_drafted - 1)
    return replace(share, known=share.known[:-1])


def _room(sequence: Sequence, most: int, context_length: int) -> int:
    """How many guesses the slot and the answer have room for."""
    answer = sequence.max_tokens - sequence.num_output_tokens - 1
    return max(0, min(most, answer, context_length - sequence.num_tokens))
