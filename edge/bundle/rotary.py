"""Rotary tables, as the graph has them: computed at load, for a number of positions that the runtime chooses."""

from __future__ import annotations

from typing import Final

POSITIONS: Final = "rotary.positions"
"""The graph's constant with the number of positions, int64 []; in the data file, so that another can take its place."""


def rotary_positions(context: int) -> int:
    """Positions that the tables need for sequences of so many tokens."""
    # One more, for the token that fills a step up; and GroupQueryAttention wants a multiple of 8.
    return -(-(context + 1) // 8) * 8
