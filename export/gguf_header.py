"""The header of a GGUF file, read with bounds [1].

The reader of the ``gguf`` package maps the file, trusts its counts and needs seconds for the token arrays of a real
model; this one reads the header once, from start to end, and never allocates more than the header's own size allows.

[1] https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edge.errors import CheckpointError
from export.files import DAMAGED, shown, unreadable

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 128 << 20
"""Ten times the largest vocabulary of the supported families."""
MAX_ENTRIES = 1 << 16
"""Most key-value pairs, and most tensors."""
MAX_ARRAY = 1 << 22
"""Most elements of one array."""
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS: Final[Mapping[int, str]] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Value type → its struct code."""


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """Row-major, slowest axis first (the file stores it the other way round)."""
    type: Any  # GGMLQuantizationType; the package has no type hints
    offset: int
    """First byte, from the start of the file."""
    row_bytes: int

    @property
    def end(self) -> int:
        """Byte after the last one."""
        return self.offset + math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensor table of a file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Read metadata and tensor table.

    Raises:
        CheckpointError: the file is no GGUF, of a version that is not supported, truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            return _HeaderReader(path.name, file, path.stat().st_size).header()
    except OSError as error:
        raise unreadable(path, error) from None


class _HeaderReader:
    """A cursor over the header that knows where the file ends."""

    def __init__(self, name: str, file: BinaryIO, size: int) -> None:
        self.name = name
        self.file = file
        self.size = size
        self.position = 0

    def header(self) -> GGUFHeader:
        if self.read(4) != MAGIC:
            raise self.error("is no GGUF file")
        version = self.scalar("I")
        if version not in (2, 3):
            what = "is big-endian" if version & 0xFFFF == 0 else f"has GGUF version {version}"
            raise self.error(f"{what}, which is not supported", hint="use a little-endian GGUF of version 2 or 3")
        num_tensors, num_pairs = self.scalar("Q"), self.scalar("Q")
        if max(num_tensors, num_pairs) > MAX_ENTRIES:
            raise self.error(f"claims {num_tensors} tensors and {num_pairs} metadata entries")
        metadata = self.metadata(num_pairs)
        return GGUFHeader(metadata, self.tensors(num_tensors, self.alignment(metadata)))

    def metadata(self, num_pairs: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.string()
            if key in pairs:
                raise self.error(f"has the metadata key {shown(key)} twice")
            pairs[key] = self.value(self.scalar("I"), key)
        return pairs

    def tensors(self, num_tensors: int, alignment: int) -> dict[str, GGUFTensor]:
        entries = [self.tensor() for _ in range(num_tensors)]
        data_start = -(-self.position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, relative in entries:
            if name in tensors:
                raise self.error(f"has tensor {shown(name)} twice")
            if relative % alignment:
                raise self.error(f"puts tensor {shown(name)} at byte {relative}, which is not aligned to {alignment}")
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
            row_bytes = shape[-1] // block_size * block_bytes
            tensors[name] = GGUFTensor(name, shape, kind, data_start + relative, row_bytes)
        self.check_places(tensors)
        return tensors

    def tensor(self) -> tuple[str, tuple[int, ...], Any, int]:
        """One entry as (name, shape, type, offset from the start of the data)."""
        name = self.string()
        num_dims = self.scalar("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.error(f"gives tensor {shown(name)} {num_dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(num_dims))[::-1]
        code, offset = self.scalar("I"), self.scalar("Q")
        if code not in GGML_QUANT_SIZES:
            hint = "use a quantization that this version of the gguf package knows, such as Q4_K_M or Q8_0"
            raise self.error(f"stores tensor {shown(name)} as the unknown type {code}", hint=hint)
        kind = GGMLQuantizationType(code)
        if not all(0 < dim < 1 << 48 for dim in shape) or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise self.error(f"gives tensor {shown(name)} the shape {shown(list(shape))}, impossible for {kind.name}")
        return name, shape, kind, offset

    def check_places(self, tensors: Mapping[str, GGUFTensor]) -> None:
        previous_end = 0
        for tensor in sorted(tensors.values(), key=lambda each: each.offset):
            if tensor.offset < previous_end:
                raise self.error(f"puts tensor {shown(tensor.name)} over the one before")
            if tensor.end > self.size:
                raise self.error(f"is truncated: tensor {shown(tensor.name)} ends at byte {tensor.end} of {self.size}")
            previous_end = tensor.end

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if not isinstance(value, int) or not 1 <= value <= 1 << 20 or value & (value - 1):
            raise self.error(f"has the alignment {shown(value)}, not a power of two")
        return value

    def value(self, kind: int, key: str) -> Any:
        """A value: a number, a string, a list of strings, or an array of numbers."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.error(f"has the unknown value type {kind} at {shown(key)}")
        return self.scalar(_SCALARS[kind])

    def array(self, key: str) -> Any:
        kind, length = self.scalar("I"), self.scalar("Q")
        if length > MAX_ARRAY:
            raise self.error(f"claims {length} elements at {shown(key)}")
        if kind == _STRING:
            return [self.string() for _ in range(length)]
        if kind not in _SCALARS:
            raise self.error(f"has an array of the unsupported type {kind} at {shown(key)}")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self.read(length * dtype.itemsize), dtype)

    def string(self) -> str:
        content = self.read(self.scalar("Q"))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"has a string that is not UTF-8 before byte {self.position}") from None

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.read(struct.calcsize("<" + code)))[0]

    def read(self, num_bytes: int) -> bytes:
        self.position += num_bytes
        if self.position > min(self.size, MAX_HEADER_BYTES):
            raise self.error(f"is truncated: its header needs byte {self.position} of {self.size}")
        content = self.file.read(num_bytes)
        if len(content) != num_bytes:
            raise self.error("became shorter while it was read")
        return content

    def error(self, what: str, *, hint: str = DAMAGED) -> CheckpointError:
        return CheckpointError(f"{self.name} {what}", hint=hint)
