"""A reference that favours no grid, and a file of it from which llama.cpp can start.

    .venv/bin/python -m tests.bench.dither model.gguf dithered.gguf
    llama-imatrix -m dithered.gguf -f export/calibration.txt -o imatrix.gguf
    llama-quantize --imatrix imatrix.gguf dithered.gguf peer.gguf Q4_K_M

A GGUF holds weights that lie on a grid of llama.cpp's own; a recipe would be blamed for leaving it, and llama.cpp would
find its way back without a loss. *Dithered* weights have uniform noise of half a step either way, from a seed. What is
written has them in float32, one table where the source has the same twice, and all else as the source has it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from export.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from export.gguf_checkpoint import EMBEDDING

SEED = 1
_TABLE = "token_embd.weight"
_OF_THE_FILE = frozenset({"general.architecture", "general.file_type", "general.quantization_version"})
"""Keys that the writer, or what quantizes the file, sets itself."""
_CODES: dict[str, list[tuple[int, int, int]]] = {
    "Q4_0": [(2, 18, 0x11)],
    "Q4_1": [(4, 20, 0x11)],
    "Q5_0": [(2, 6, 0), (6, 22, 0x11)],
    "Q5_1": [(4, 8, 0), (8, 24, 0x11)],
    "Q8_0": [(2, 34, 1)],
    "Q4_K": [(16, 144, 0x11)],
    "Q5_K": [(16, 48, 0), (48, 176, 0x11)],
    "Q6_K": [(0, 128, 0x11), (128, 192, 0)],
}
"""Bytes of a GGUF block that hold codes, and what makes every code one: the last range is also the block's end, less
scales that follow it."""
_BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


class Dithered:
    """A checkpoint with noise of half a step on every weight; otherwise that checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """As :meth:`Checkpoint.rows`; the same rows get the same noise however they are read."""
        rows = self._checkpoint.rows(name, start, stop)
        dtype = self._checkpoint.tensors[name].dtype
        if dtype in {"F32", "F16", "BF16"}:
            return rows
        # One counter makes four numbers; all widths of blocks are multiples of that.
        generator = np.random.Philox(key=crc32(name.encode()) + (SEED << 32)).advance(start * rows.shape[1] // 4)
        noise = np.random.Generator(generator).random(rows.shape) - 0.5
        return (rows + self._steps(name, dtype, start, len(rows)) * noise).astype(np.float32)

    def _steps(self, name: str, dtype: str, start: int, count: int) -> NDArray[np.float32]:
        """The step of the grid at each weight: the value of code one less that of code zero."""
        tensor = cast("StoredTensor", self._checkpoint.stored(name))
        raw = np.array(tensor.file.read(tensor.offset + start * tensor.row_bytes, count * tensor.row_bytes))
        blocks = raw.reshape(-1, _BLOCK_BYTES[dtype])
        values = []
        for number in (0, 1):
            for begin, end, ones in _CODES[dtype]:
                blocks[:, begin:end] = number * ones
            values.append(tensor.decode(blocks.reshape(count, -1)).reshape(count, -1))
        steps: NDArray[np.float32] = np.abs(values[1] - values[0])
        return steps


def write_gguf(source: Path, destination: Path) -> None:
    """Write the dithered weights of a GGUF in float32, with its metadata."""
    reader = GGUFReader(source)
    writer = GGUFWriter(destination, arch=reader.fields["general.architecture"].contents())
    _copy_metadata(reader, writer)
    with open_checkpoint(source) as checkpoint:
        names = _names(reader, checkpoint)
        for written, name in names.items():
            shape = checkpoint.tensors[name].shape
            writer.add_tensor_info(written, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names.values():
            writer.write_tensor_data(Dithered(checkpoint).rows(name))
    writer.close()


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in _OF_THE_FILE:
            kind, inner = field.types[0], field.types[-1]
            writer.add_key_value(field.name, field.contents(), kind, inner if kind is GGUFValueType.ARRAY else None)


def _names(reader: GGUFReader, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's name of each tensor; where it lies tells which it is."""
    names = {cast("StoredTensor", checkpoint.stored(name)).offset: name for name in checkpoint.tensors}
    found = {tensor.name: names.get(tensor.data_offset) for tensor in reader.tensors}
    # The coarser of two tables has none; the finer is the one that llama.cpp takes for both.
    return {_TABLE if name == EMBEDDING else written: name for written, name in found.items() if name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    args = parser.parse_args()
    write_gguf(args.source, args.destination)


if __name__ == "__main__":
    main()
