"""Where to keep the state of a prompt, so that later prompts can go on from there (docs/adr/0008).

Keys and values of a prompt serve every prompt that begins alike, however far. A state serves those that begin with
exactly its tokens, so it has to be kept where others will part. That is shortly before the end of a prompt, where the
next turn of a conversation leaves it, since templates write answers in the history differently from what they ask to be
continued; where a prompt parts from one that came before, as two questions after one system prompt do; and at the end
of an answer. The latter two are what Marconi keeps (Pan et al. 2024) [1].

[1] https://arxiv.org/abs/2411.19379
"""

from __future__ import annotations

from edge.engine.prefix import MIN_TOKENS
from edge.engine.rows import UNIT

TAIL_TOKENS = 16
"""More than templates put after the last message. A step of so many tokens takes no longer than they do in a larger."""


def snapshot_lengths(num_tokens: int, known: int, shared: int) -> tuple[int, ...]:
    """At which lengths of a prompt to keep its state, in order; where steps may end (:func:`chunk_end`).

    Args:
        num_tokens: of the prompt.
        known: tokens that it goes on from.
        shared: tokens that it has in common with an earlier prompt.
    """
    tail = _whole(num_tokens - TAIL_TOKENS)
    parting = _whole(shared)
    if tail < known + MIN_TOKENS:
        return ()
    return (parting, tail) if known + MIN_TOKENS <= parting <= tail - MIN_TOKENS else (tail,)


def chunk_end(past: int, most: int, num_tokens: int, stops: tuple[int, ...]) -> int:
    """Where a step of prefill ends that begins at ``past``.

    A step has a multiple of ``UNIT`` tokens unless it ends at a stop, and the last one has more than one: then how a
    prompt is cut does not change how its tokens are rounded (docs/architecture.md).

    Args:
        past: tokens that are there.
        most: most tokens of the step.
        num_tokens: of the prompt.
        stops: lengths at which a step has to end.
    """
    stop = min((each for each in stops if each > past), default=num_tokens)
    if stop - past <= most:
        return stop
    end = past + max(UNIT, _whole(most))
    return end - UNIT if stop - end == 1 and end - past > UNIT else end


def _whole(number: int) -> int:
    return number // UNIT * UNIT
