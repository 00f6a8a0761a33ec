"""One saved prefix as a file: header, token ids, keys and values, state, and a tag that authenticates all of it.

::

    header    magic, version, element type, shape of the cache, size of the state, binding, owner (little-endian)
    ids       [num_tokens] int32
    padding   zeros up to a multiple of 64
    cache     [2 * layers, kv_heads, num_tokens, head_dim]
    padding   zeros up to a multiple of 64
    state     [size] float32; of models with linear attention
    tag       HMAC-SHA256 over everything before it, 32 bytes

``binding`` and ``owner`` are keyed digests too: of the model that computed the cache, and of the client it belongs to.
A file is read into memory first and authenticated there; what is used is what was checked, whatever happens to the
file meanwhile.
"""

from __future__ import annotations

import hmac
import math
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAGIC = b"QWPREFIX"
VERSION = 2
TAG_BYTES = 32
MAX_TOKENS = 1 << 20
"""More than any context; it bounds what a damaged header can make us read."""
_HEADER = struct.Struct("<8sIB3x5I32s32s")
_ALIGN = 64
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.float16),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint8),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class UnusableError(Exception):
    """A file is not one that this device wrote for this model, or is damaged."""


@dataclass(frozen=True)
class Head:
    """What a file says of itself before the keys and values."""

    binding: bytes
    """Of the model; 32 bytes."""
    owner: bytes
    """Of the identity; 32 bytes."""
    ids: NDArray[np.int32]  # [num_tokens]
    dtype: np.dtype[Any]
    shape: tuple[int, int, int, int]
    """Of the cache: [2 * layers, kv_heads, num_tokens, head_dim]."""
    state_size: int = 0
    """Numbers of the state; 0 = there is none."""

    @property
    def is_whole(self) -> bool:
        """Whether it is of use as a whole only."""
        return self.state_size > 0

    @property
    def cache_offset(self) -> int:
        """Where keys and values begin."""
        return _aligned(_HEADER.size + 4 * self.shape[2])

    @property
    def cache_size(self) -> int:
        """Bytes of keys and values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def state_offset(self) -> int:
        """Where the state begins, or would."""
        return _aligned(self.cache_offset + self.cache_size)

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.state_offset + 4 * self.state_size + TAG_BYTES

    def pack(self) -> bytes:
        """Header, ids and padding."""
        sizes = (*self.shape, self.state_size)
        header = _HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], *sizes, self.binding, self.owner)
        return (header + self.ids.astype("<i4").tobytes()).ljust(self.cache_offset, b"\0")

    @classmethod
    def read(cls, file: BinaryIO, binding: bytes) -> Head:
        """Read the beginning of a file. Nothing of it is authenticated yet, but its length is plausible.

        Raises:
            UnusableError: this is no such file, it has another version or binding, or its size is not what the header
                promises.
            OSError: the disk refused.
        """
        header = os.pread(file.fileno(), _HEADER.size, 0)
        if len(header) != _HEADER.size:
            raise UnusableError
        magic, version, code, layers, heads, num_tokens, head_dim, state_size, *digests = _HEADER.unpack(header)
        its_binding, owner = digests
        if magic != MAGIC or version != VERSION or code not in _DTYPES or not 0 < num_tokens <= MAX_TOKENS:
            raise UnusableError
        raw = os.pread(file.fileno(), 4 * num_tokens, _HEADER.size)
        if len(raw) != 4 * num_tokens or not hmac.compare_digest(its_binding, binding):
            raise UnusableError
        ids = np.frombuffer(raw, "<i4").astype(np.int32)
        head = cls(binding, owner, ids, _DTYPES[code], (layers, heads, num_tokens, head_dim), state_size)
        if head.file_size != os.fstat(file.fileno()).st_size:
            raise UnusableError
        return head


def can_hold(cache: NDArray[Any]) -> bool:
    """Whether the format knows the element type."""
    return cache.dtype in _CODES


def write_prefix(
    file: BinaryIO, head: Head, cache: NDArray[Any], state: NDArray[np.float32] | None, key: bytes
) -> None:
    """Write a whole file.

    Args:
        file: open for writing, empty.
        head: its ``shape`` may hold fewer tokens than ``cache``: the first ones are written.
        cache: keys and values [2 * layers, kv_heads, at least num_tokens, head_dim].
        state: of exactly these tokens, where there is one.
        key: authenticates the file.

    Raises:
        OSError: the disk refused.
    """
    mac = hmac.new(key, digestmod="sha256")

    def put(part: bytes | memoryview) -> None:
        mac.update(part)
        file.write(part)

    put(head.pack())
    for layer in cache:  # one at a time: a copy of the whole would double the memory
        put(np.ascontiguousarray(layer[:, : head.shape[2]]).reshape(-1).view(np.uint8).data)
    put(bytes(head.state_offset - head.cache_offset - head.cache_size))
    if state is not None:
        put(state.view(np.uint8).data)
    file.write(mac.digest())


def read_arrays(file: BinaryIO, expected: Head, key: bytes) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Read a whole file and authenticate it.

    Returns:
        Keys and values [2 * layers, kv_heads, num_tokens, head_dim], and the state where there is one.

    Args:
        file: open for reading, unbuffered.
        expected: what :meth:`Head.read` said of it earlier.
        key: the one it was written with.

    Raises:
        UnusableError: a byte is not what was written, or it is another file by now.
        MemoryError: there is no room for it.
        OSError: the disk refused.
    """
    if os.fstat(file.fileno()).st_size != expected.file_size:
        raise UnusableError
    data = np.empty(expected.file_size, np.uint8).data
    filled = 0
    while count := os.preadv(file.fileno(), [data[filled:]], filled):
        filled += count
    mac = hmac.new(key, digestmod="sha256")
    mac.update(data[:-TAG_BYTES])
    begin = expected.pack()
    if filled != len(data) or not hmac.compare_digest(mac.digest(), data[-TAG_BYTES:]):
        raise UnusableError
    if data[: len(begin)] != begin:
        raise UnusableError
    cache = np.frombuffer(data[len(begin) : len(begin) + expected.cache_size], expected.dtype)
    state = np.frombuffer(data[expected.state_offset : -TAG_BYTES], np.float32)
    return cache.reshape(expected.shape), state if expected.is_whole else None


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
