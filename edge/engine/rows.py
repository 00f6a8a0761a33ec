"""How many rows a step takes, for a token to have the same bits in every one (docs/lab-notes.md).

On x86 the products take rows in pairs, and sum the last of an odd number in another order than all others. On ARM64
they take any number alike, except 4-bit weights on cores that cannot multiply bytes: there they are computed in
float32, and a row by itself has a routine of its own. What matters on ARM64 is attention: it takes keys in fours, and
sums what is left over in another order, so a step has to end at a multiple of four tokens. On both, a single token has
an attention of its own.
"""

from __future__ import annotations

import platform

from edge.machine import isa_features

_ARM = platform.machine() == "aarch64"
UNIT = 4 if _ARM else 2
"""Tokens of a prompt that are rounded together: fewer are filled up with some that nobody needs."""


def appended(num_tokens: int, past: int) -> int:
    """Rows of a step with several tokens of one sequence after ``past`` of them, at most ``UNIT`` more than tokens."""
    if not _ARM:
        return round_up(num_tokens, UNIT)
    rows = round_up(past + num_tokens, UNIT) - past
    return rows if rows > 1 else rows + UNIT


def row_multiple(of_bundle: int) -> int:
    """Rows that a decode step has a multiple of on this machine, given the ``row_multiple`` of the bundle."""
    return max(of_bundle, 2) if _ARM and "asimddp" not in isa_features() else of_bundle


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below a number."""
    return -(-number // multiple) * multiple
