"""The seam between scheduler and engine: what one may ask of the other, in token ids, slots and logits.

:class:`edge.engine.engine.Engine` is the real one; tests of what lies above put a fake one here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.engine.kv_cache import Cache
from edge.engine.lora import Adapter
from edge.engine.state_pool import State


class Engine(Protocol):
    """What the scheduler needs of an engine."""

    slots: int
    """Sequences whose keys and values it holds."""
    rows: int
    """Most tokens of one decode step, over all sequences; at least ``slots``."""
    context_length: int
    """Tokens that one slot holds."""
    prefill_chunk: int
    """Most tokens of one prefill step."""
    score_chunk: int
    """Most tokens of one scoring step."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        ...

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of state that one sequence takes, however long it is; 0 where all layers have full attention."""
        ...

    def prefill(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n] to the ``past`` tokens of a slot; returns the last position's logits [padded_vocab]."""
        ...

    def score(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n] like :meth:`prefill`; returns the logits [n, padded_vocab] of all positions."""
        ...

    def embed(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n] like :meth:`prefill`; returns the hidden states [n, hidden] of all positions."""
        ...

    def decode(self, slots: Sequence[int], ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """Append ``ids[i]`` to the first ``past[i]`` tokens of ``slots[i]``; returns logits [n, padded_vocab].

        A slot may be named several times, with a ``past`` that grows by one: its tokens then follow each other. Those
        that turn out wrong are taken back by going on from fewer, from as many as :meth:`kept_length` says.
        The returned array is valid until the next call.
        """
        ...

    def use_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Let the tokens of a slot be computed with an adapter, or without, until the slot is released."""
        ...

    def kept_length(self, slot: int, most: int) -> int:
        """The longest beginning of a slot, of at most ``most`` tokens, that can be gone on from or read.

        Without states that is ``most``. A state is known after all tokens of the slot, and before the last step in
        which several of its tokens were decoded.
        """
        ...

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a slot over another slot's."""
        ...

    def read_slot(self, slot: int, length: int) -> Cache:
        """A copy of the keys and values of a slot's first tokens."""
        ...

    def write_slot(self, slot: int, cache: Cache, length: int) -> None:
        """Put the first ``length`` tokens of what :meth:`read_slot` returned into a slot."""
        ...

    def read_state(self, slot: int, length: int) -> State | None:
        """A copy of a slot's state after its first ``length`` tokens; None where there are no states."""
        ...

    def write_state(self, slot: int, state: State, length: int) -> None:
        """Put what :meth:`read_state` returned beside the keys and values of the first ``length`` tokens."""
        ...

    def release_slot(self, slot: int) -> None:
        """Give a slot's memory back; its tokens are gone."""
        ...

    def rest(self) -> None:
        """Give back memory that steps have used, as none will come for a moment."""
        ...

    def sleep(self) -> None:
        """Give the memory of the weights back, until :meth:`wake`. Slots keep their tokens."""
        ...

    def wake(self) -> None:
        """Load the weights again.

        Raises:
            QwedgeError: they are not what they were, or cannot be loaded; another call tries again.
        """
        ...
