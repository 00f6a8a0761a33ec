"""The seam between scheduler and engine: what one may ask of the other, in token ids, rows and logits.

:class:`edge.engine.engine.Engine` is the real one; tests of what lies above put a fake one here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """What the scheduler needs of an engine."""

    slots: int
    """Rows of the KV pool: sequences that can be in prefill or decode at once."""
    context_length: int
    """Tokens that one row holds."""
    prefill_chunk: int
    """Most tokens of one prefill step."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        ...

    def prefill(self, row: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n] to the ``past`` tokens of ``row``; returns the last position's logits [padded_vocab]."""
        ...

    def decode(self, ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """Append ``ids[i]`` to the ``past[i]`` tokens of row i, for rows 0..n-1; returns logits [n, padded_vocab].

        The returned array is valid until the next call.
        """
        ...

    def verify(self, row: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n] like :meth:`prefill`; returns the logits [n, padded_vocab] of all positions."""
        ...

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a row over another row and give the source's memory back."""
        ...

    def read_row(self, row: int, length: int) -> NDArray[np.float32]:
        """A copy of the keys and values of a row's first tokens."""
        ...

    def write_row(self, row: int, cache: NDArray[np.float32], length: int) -> None:
        """Put the first ``length`` tokens of what :meth:`read_row` returned into a row."""
        ...

    def release_row(self, row: int) -> None:
        """Give a row's memory back; its tokens are gone."""
        ...
