"""What goes into one prefill step: the next chunk of a prompt, for its logits or for who reads along."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.engine.interface import Engine
from edge.sequence import Sequence
from edge.slots import Slots
from edge.throttle import Throttle


class Prefilling:
    """Prefill steps of an engine. The engine's thread only.

    Args:
        engine: runs them.
        slots: whose states bound a step.
        throttle: says how much of a chunk may be read at once.
    """

    def __init__(self, engine: Engine, slots: Slots, throttle: Throttle) -> None:
        self._engine = engine
        self._slots = slots
        self._throttle = throttle

    def run(self, sequence: Sequence, *, shares: bool) -> NDArray[np.float32]:
        """Append the next chunk of a prompt to its slot.

        Args:
            sequence: that has a slot and a prompt that is not all in it.
            shares: whether answers are running, which pause meanwhile.

        Returns:
            The logits of its last position [padded_vocab]; its hidden state [hidden] where those are read along.
        """
        past = sequence.num_computed_tokens
        chunk = sequence.prompt_ids[past : self._slots.chunk_end(sequence, self._most(sequence, shares=shares))]
        last = self._read(sequence, chunk, past)
        sequence.num_computed_tokens = past + len(chunk)
        return last

    def _read(self, sequence: Sequence, chunk: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        reader = sequence.prompt_reader
        if reader is None:
            return self._engine.prefill(sequence.slot, chunk, past)
        read = self._engine.score if reader.reads == "logits" else self._engine.embed
        rows = read(sequence.slot, chunk, past)
        reader(past, rows)
        last: NDArray[np.float32] = rows[-1]
        return last

    def _most(self, sequence: Sequence, *, shares: bool) -> int:
        reader = sequence.prompt_reader
        scores = reader is not None and reader.reads == "logits"
        most = self._engine.score_chunk if scores else self._engine.prefill_chunk
        return self._throttle.chunk(max(1, most // 2) if shares else most)
