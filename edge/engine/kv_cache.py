"""The KV pool: keys and values of all sequences, one row per slot.

Per layer two arrays [slots, kv_heads, context, head_dim] float32, all in one anonymous mapping. The mapping reserves
address space for every slot at full context, but a page takes memory only once a token is written to it, and
:meth:`KVPool.release` hands a row's pages back. So the pool is bound to the session once, never grows and never moves,
while its resident size follows the tokens that are in it.
"""

from __future__ import annotations

import math
import mmap

import numpy as np
from numpy.typing import NDArray

from edge.bundle import KVLayout
from edge.errors import ConfigError


class KVPool:
    """Rows of keys and values.

    Args:
        layout: layers, heads and head dimension.
        slots: rows.
        context: tokens per row; rounded up so that rows are whole pages.

    Raises:
        ConfigError: the address space cannot be reserved.
    """

    def __init__(self, layout: KVLayout, *, slots: int, context: int) -> None:
        token_bytes = layout.kv_heads * layout.head_dim * 4
        tokens_per_page = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, token_bytes)
        self.layers = layout.layers
        self.slots = slots
        self.context = -(-context // tokens_per_page) * tokens_per_page
        self._row_bytes = self.context * token_bytes
        self._shape = (2 * layout.layers, slots, layout.kv_heads, self.context, layout.head_dim)
        size = self._row_bytes * slots * 2 * layout.layers
        try:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            hint = "serve with fewer --slots or a smaller --context"
            raise ConfigError(f"cannot reserve {size >> 20} MiB for the KV cache: {error}", hint=hint) from None
        # A huge page would make one token of one head take 2 MiB.
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._arrays = np.frombuffer(self._memory, dtype=np.float32).reshape(self._shape)

    def keys(self, layer: int, first: int, count: int) -> NDArray[np.float32]:
        """Keys of ``count`` rows from ``first`` [count, kv_heads, context, head_dim], in place."""
        return self._arrays[2 * layer, first : first + count]

    def values(self, layer: int, first: int, count: int) -> NDArray[np.float32]:
        """Values of ``count`` rows from ``first`` [count, kv_heads, context, head_dim], in place."""
        return self._arrays[2 * layer + 1, first : first + count]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source`` over row ``target`` and release ``source``."""
        self._arrays[:, target, :, :length] = self._arrays[:, source, :, :length]
        self.release(source)

    def read_row(self, row: int, length: int) -> NDArray[np.float32]:
        """A copy of the first ``length`` tokens of a row [2 * layers, kv_heads, length, head_dim]."""
        return self._arrays[:, row, :, :length].copy()

    def write_row(self, row: int, cache: NDArray[np.float32], length: int) -> None:
        """Put the first ``length`` tokens of what :meth:`read_row` returned into a row."""
        self._arrays[:, row, :, :length] = cache[:, :, :length]

    def release(self, row: int) -> None:
        """Give the memory of a row back to the system; its contents are zeros afterwards."""
        for array in range(2 * self.layers):
            offset = (array * self.slots + row) * self._row_bytes
            self._memory.madvise(mmap.MADV_DONTNEED, offset, self._row_bytes)
