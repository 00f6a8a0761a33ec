"""The KV pool: keys and values of all sequences, one slot each, and the window through which a decode step sees them.

A slot holds per layer two arrays [kv_heads, context, head_dim]. All slots lie in one anonymous file in memory, which
reserves room for every slot at full context but takes memory only for tokens that are in it; :meth:`KVPool.release`
hands a slot's pages back. So the pool is bound to the session once and never moves.

onnxruntime wants the rows of a batch side by side in one array. The window gives it that: ``rows`` places per array,
each of which the processor's page tables can make show any slot (``mmap`` with ``MAP_FIXED``), and several of them the
same. No keys or values are copied when sequences come and go, and the tokens of a guess can be verified as rows of a
batch, each with one token more before it, in one step: row i writes its keys and values where row i + 1 reads them.
GroupQueryAttention writes the new tokens of all rows before it reads any. Every row is then computed exactly as in a
plain decode step, to the last bit (docs/adr/0005).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge.bundle import KVLayout
from edge.errors import ConfigError, EngineError

Cache = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.int8]
"""Keys and values, in the type that the bundle keeps them in."""

_MAP_FIXED = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]


class KVPool:
    """Slots of keys and values.

    Args:
        layout: layers, heads, head dimension and type.
        slots: sequences it holds.
        context: tokens per slot; rounded up so that slots are whole pages.
        rows: most rows of a decode step.

    Raises:
        ConfigError: the address space cannot be reserved.
    """

    def __init__(self, layout: KVLayout, *, slots: int, context: int, rows: int) -> None:
        dtype = np.dtype(layout.dtype)
        token_bytes = layout.kv_heads * layout.head_dim * dtype.itemsize
        tokens_per_page = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, token_bytes)
        self.layers = layout.layers
        self.context = -(-context // tokens_per_page) * tokens_per_page
        self._array_bytes = self.context * token_bytes
        self._arrays = 2 * layout.layers
        self._slot_bytes = self._arrays * self._array_bytes
        shape = (layout.kv_heads, self.context, layout.head_dim)
        try:
            self._fd = os.memfd_create("kv-cache")
            weakref.finalize(self, os.close, self._fd)
            os.ftruncate(self._fd, slots * self._slot_bytes)
            self._memory = mmap.mmap(self._fd, slots * self._slot_bytes)
            # Addresses without access and without memory, until a row shows a slot.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            window = mmap.mmap(-1, self._arrays * rows * self._array_bytes, flags=flags, prot=0)
        except (OSError, OverflowError, ValueError) as error:
            size = slots * self._slot_bytes
            hint = "serve with fewer --slots or a smaller --context"
            raise ConfigError(f"cannot reserve {size >> 20} MiB for the KV cache: {error}", hint=hint) from None
        self._slots = np.frombuffer(self._memory, dtype).reshape(slots, self._arrays, *shape)
        self._window = np.frombuffer(window, dtype).reshape(self._arrays, rows, *shape)
        self._shown = [-1] * rows  # the slot that each row of the window shows

    def slot(self, layer: int, slot: int) -> tuple[Cache, Cache]:
        """Keys and values of one slot [1, kv_heads, context, head_dim] each, in place."""
        return self._slots[slot, 2 * layer, None], self._slots[slot, 2 * layer + 1, None]

    def rows(self, layer: int, count: int) -> tuple[Cache, Cache]:
        """Keys and values of the window's first rows [count, kv_heads, context, head_dim] each, in place."""
        return self._window[2 * layer, :count], self._window[2 * layer + 1, :count]

    def show(self, slots: Sequence[int]) -> list[int]:
        """Let the window's first rows show these slots, each as often as it is named.

        Rows that show a wanted slot already stay as they are, since changing one costs as much as touching its pages.

        Returns:
            For each element of ``slots`` its row, below ``len(slots)``.
        """
        showing: dict[int, list[int]] = {}
        for row in reversed(range(len(slots))):
            showing.setdefault(self._shown[row], []).append(row)
        places = [showing[slot].pop() if showing.get(slot) else -1 for slot in slots]
        spare = [row for rows in showing.values() for row in rows]
        for i, slot in enumerate(slots):
            if places[i] < 0:
                places[i] = spare.pop()
                self._show(places[i], slot)
        return places

    def show_at(self, places: Sequence[int], slots: Sequence[int]) -> None:
        """Let row ``places[i]`` of the window show ``slots[i]``."""
        for row, slot in zip(places, slots, strict=True):
            if self._shown[row] != slot:
                self._show(row, slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a slot over another slot's."""
        self.write(target, self._slots[source], length)
        self._forget_pages(source)

    def read(self, slot: int, length: int) -> Cache:
        """A copy of the first ``length`` tokens of a slot [2 * layers, kv_heads, length, head_dim]."""
        copy: Cache = self._slots[slot, :, :, :length].copy()
        self._forget_pages(slot)
        return copy

    def write(self, slot: int, cache: Cache, length: int) -> None:
        """Put the first ``length`` tokens of what :meth:`read` returned into a slot.

        Raises:
            OSError: no memory.
        """
        # Written as to a file: storing into the mapping would clear each page first, and take a fault for it.
        head_bytes = self._array_bytes // cache.shape[1]
        for array, heads in enumerate(cache):
            offset = slot * self._slot_bytes + array * self._array_bytes
            for head, tokens in enumerate(heads):
                _write_all(self._fd, tokens[:length], offset + head * head_bytes)

    def release(self, slot: int) -> None:
        """Give the memory of a slot back to the system; its contents are zeros afterwards."""
        self._memory.madvise(mmap.MADV_REMOVE, slot * self._slot_bytes, self._slot_bytes)

    def _show(self, row: int, slot: int) -> None:
        for array in range(self._arrays):
            address = self._window[array, row].ctypes.data
            offset = slot * self._slot_bytes + array * self._array_bytes
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_SHARED | _MAP_FIXED
            if _libc.mmap(address, self._array_bytes, protection, flags, self._fd, offset) != address:
                reason = os.strerror(ctypes.get_errno())
                hint = "raise vm.max_map_count, or serve with smaller slots and draft_tokens"
                raise EngineError(f"the KV cache cannot be mapped: {reason}", hint=hint)
        self._shown[row] = slot
        self._forget_pages(slot)

    def _forget_pages(self, slot: int) -> None:
        """Drop this process's page table entries for a slot outside the window, so that no page counts twice as RSS.

        The contents stay in the file.
        """
        self._memory.madvise(mmap.MADV_DONTNEED, slot * self._slot_bytes, self._slot_bytes)


def _write_all(fd: int, data: Cache, offset: int) -> None:
    rest = data.data.cast("B")
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written
