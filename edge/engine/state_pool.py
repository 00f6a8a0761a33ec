"""The state pool: what layers of linear attention remember of all sequences (docs/adr/0008).

A state has one size however long its sequence is: per layer the last inputs of a convolution, and a matrix for every
head. Appending a token overwrites it, so what a sequence was some tokens ago is known only where a state was kept. A
slot has one state, or two for a moment: while guessed tokens are verified, the one before them is left as it was.

onnxruntime wants the states of a batch side by side, and writes them in place. So all states of a layer are rows of one
array, the sequences of a decode step have the first rows (one by itself has any), and a row is copied only when
sequences come or go: 19 MB each for a model of 0.8 billion parameters, which no step could afford. Rows take memory
once they are used.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.bundle import StateLayout
from edge.errors import ConfigError

State = NDArray[np.float32]
"""One sequence's state as a row of numbers [bytes_per_slot / 4]."""

_ITEM_BYTES = 4
_PER_SLOT = 2


@dataclass(eq=False)
class _Kept:
    """A state of a slot."""

    row: int
    length: int
    """Tokens that it has seen."""


class StatePool:
    """The states of all slots.

    Args:
        layout: layers and shapes.
        slots: sequences it holds.

    Raises:
        ConfigError: the address space cannot be reserved.
    """

    def __init__(self, layout: StateLayout, *, slots: int) -> None:
        # However many states there are, a decode step can have its rows for itself.
        self._num_rows = (_PER_SLOT + 1) * slots
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(layout.layers):
            shapes[f"conv.{layer}"] = (layout.conv_channels, layout.conv_kernel)
            shapes[f"recurrent.{layer}"] = (layout.value_heads, layout.key_dim, layout.value_dim)
        sizes = [_whole_pages(_ITEM_BYTES * self._num_rows * math.prod(shape)) for shape in shapes.values()]
        try:
            self._memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            hint = "serve with fewer --slots"
            raise ConfigError(f"cannot reserve {sum(sizes) >> 20} MiB for states: {error}", hint=hint) from None
        self._arrays: dict[str, NDArray[np.float32]] = {}
        self._offsets: list[tuple[int, int]] = []  # of each array: where it begins, and the bytes of a row
        offset = 0
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            array = np.frombuffer(self._memory, np.float32, self._num_rows * math.prod(shape), offset)
            self._arrays[name] = array.reshape(self._num_rows, *shape)
            self._offsets.append((offset, _ITEM_BYTES * math.prod(shape)))
            offset += size
        self._states: list[list[_Kept]] = [[] for _ in range(slots)]  # the oldest first
        self._at: list[_Kept | None] = [None] * self._num_rows
        self._stepping = 0
        """Rows of the last decode step."""
        self.num_copied = 0
        """Rows copied to other rows since the start."""

    def rows(self, first: int, count: int) -> Mapping[str, NDArray[np.float32]]:
        """Rows of the arrays of all layers, in place: ``conv.{layer}`` and ``recurrent.{layer}``."""
        return {name: array[first : first + count] for name, array in self._arrays.items()}

    def seek(self, slot: int, past: int) -> int:
        """Go back, or on, to a slot's state after ``past`` tokens; 0 makes a new one. Its other states are gone.

        Returns:
            Its row.
        """
        found = next((state for state in self._states[slot] if state.length == past), None)
        for state in self._states[slot]:
            if state is not found:
                self._at[state.row] = None
        if found is None:
            assert past == 0, f"slot {slot} has no state after {past} tokens"
            found = self._new(past)
            self._clear(found.row)
        self._states[slot] = [found]
        return found.row

    def branch(self, slot: int) -> int:
        """Let a slot have a second state, whose content the next step writes; the present one stays until :meth:`seek`.

        Returns:
            The new one's row.
        """
        (present,) = self._states[slot]
        state = self._new(present.length)
        self._states[slot].append(state)
        return state.row

    def appended(self, slot: int, count: int) -> None:
        """A slot's latest state has seen so many more tokens."""
        self._states[slot][-1].length += count

    def arrange(self, slots: Sequence[int]) -> tuple[int, list[int]]:
        """Bring the states of these slots, which are different ones, into rows side by side.

        Returns:
            The first of these rows, and for each slot which one it has of them, counted from there.
        """
        wanted = [self._states[slot][-1] for slot in slots]
        count = self._stepping = len(slots)
        if count == 1:
            return wanted[0].row, [0]
        for state in self._at[:count]:
            if state is not None and state not in wanted:
                self._move(state, self._free_row())
        for state in wanted:
            if state.row >= count:
                self._move(state, self._at.index(None, 0, count))
        return 0, [state.row for state in wanted]

    def kept_length(self, slot: int, most: int) -> int:
        """The longest beginning, of at most ``most`` tokens, that the slot has a state of; 0 if there is none."""
        return max((state.length for state in self._states[slot] if state.length <= most), default=0)

    def read(self, slot: int, length: int) -> State:
        """A copy of a slot's state after ``length`` tokens."""
        row = self._find(slot, length).row
        return np.concatenate([array[row].reshape(-1) for array in self._arrays.values()])

    def write(self, slot: int, state: State, length: int) -> None:
        """Give a slot the state after ``length`` tokens that :meth:`read` returned, in place of all it had."""
        self._drop(slot)
        kept = self._new(length)
        self._states[slot] = [kept]
        first = 0
        for array in self._arrays.values():
            size = array[kept.row].size
            array[kept.row] = state[first : first + size].reshape(array.shape[1:])
            first += size

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot another one's state after ``length`` tokens."""
        self.write(target, self.read(source, length), length)

    def release(self, slot: int) -> None:
        """Give the memory of a slot's states back to the system."""
        rows = [state.row for state in self._states[slot]]
        self._drop(slot)
        for row in rows:
            self._give_back(row)

    def rest(self) -> None:
        """Give back the memory of all rows that are nobody's."""
        for row, state in enumerate(self._at):
            if state is None:
                self._give_back(row)

    def _find(self, slot: int, length: int) -> _Kept:
        return next(state for state in self._states[slot] if state.length == length)

    def _new(self, length: int) -> _Kept:
        state = _Kept(self._free_row(), length)
        self._at[state.row] = state
        return state

    def _free_row(self) -> int:
        """The first one beyond those of decode steps: a sequence that joins them later may not even have to move."""
        return self._at.index(None, self._stepping)

    def _drop(self, slot: int) -> None:
        for state in self._states[slot]:
            self._at[state.row] = None
        self._states[slot] = []

    def _move(self, state: _Kept, row: int) -> None:
        for array in self._arrays.values():
            array[row] = array[state.row]
        self._at[state.row], self._at[row] = None, state
        state.row = row
        self.num_copied += 1

    def _clear(self, row: int) -> None:
        for array in self._arrays.values():
            array[row] = 0

    def _give_back(self, row: int) -> None:
        """The pages that hold nothing but this row."""
        for offset, size in self._offsets:
            first = _whole_pages(offset + row * size)
            last = (offset + (row + 1) * size) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
