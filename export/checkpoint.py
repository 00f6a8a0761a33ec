"""A checkpoint, whatever its format: lazy tensors under Hugging Face names, config, tokenizer and chat defaults.

:func:`open_checkpoint` picks the reader (``safetensors_checkpoint`` or ``gguf_checkpoint``); what it returns reads
tensors in row chunks as float32, so that no caller ever holds a whole table of a large model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edge.bundle import Source
from edge.errors import CheckpointError
from export.files import WeightFile, sha256_file


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says about one tensor."""

    shape: tuple[int, ...]
    """[rows, cols] or [n], in Hugging Face orientation: (out_features, in_features)."""
    dtype: str
    """Storage type as the file names it: ``BF16``, ``F16``, ``F32``, ``Q4_K``."""


class Tensor(Protocol):
    """What can be read as float32 rows, however it is stored."""

    @property
    def info(self) -> TensorInfo:
        """Shape and type."""

    @property
    def file(self) -> WeightFile:
        """Where it lies."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [stop - start, ...]."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies and how its bytes become numbers."""

    info: TensorInfo
    file: WeightFile
    offset: int
    """Byte of the file at which row 0 starts."""
    row_bytes: int
    decode: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    """[rows, row_bytes] uint8 → as many float32 values, in order."""
    order: NDArray[np.int64] | None = None
    """Row of the file in which each row stands; None = in order."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [stop - start, ...]."""
        if self.order is None:
            return self._run(start, stop)
        places = self.order[start:stop]
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        return np.concatenate([self._run(int(run[0]), int(run[0]) + len(run)) for run in runs])

    def _run(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows that follow each other in the file."""
        num_rows = stop - start
        raw = self.file.read(self.offset + start * self.row_bytes, num_rows * self.row_bytes)
        values = self.decode(raw.reshape(num_rows, self.row_bytes))
        return np.ascontiguousarray(values.reshape(num_rows, *self.info.shape[1:]))


@dataclass(frozen=True)
class GenerationDefaults:
    """How the model's makers want it sampled, and where it stops."""

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    do_sample: bool


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from, for the bundle's manifest."""

    kind: str
    """``folder``, ``gguf``, ``hub`` or ``catalog``."""
    location: str
    """File or folder name, hub id or catalog name; never a full path of this machine."""
    revision: str | None = None
    """Commit of the hub repository."""


@dataclass(frozen=True)
class Text:
    """The text side of a checkpoint."""

    tokenizer_json: bytes
    num_ids: int
    """Ids the tokenizer can produce, without the padding of the embedding table."""
    chat_template: str | None


class Checkpoint:
    """An open checkpoint; a context manager that closes its files.

    Attributes:
        config: the keys of config.json, or of its text part (a GGUF's metadata is translated to them).
        generation: sampling defaults and stop ids.
        tensors: every tensor that can be read, by its Hugging Face name.
        origin: where it came from.
        notes: what the user should know about this checkpoint, one sentence each.
        quantized: the method by which its weights were quantized already, if they are.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        generation: GenerationDefaults,
        stored: Mapping[str, Tensor],
        opened: list[WeightFile],
        text: Text,
        origin: Origin,
        files: Mapping[str, Path],
        notes: Sequence[str] = (),
        quantized: str | None = None,
    ) -> None:
        self.config = MappingProxyType(dict(config))
        self.generation = generation
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({name: each.info for name, each in stored.items()})
        self.notes = tuple(notes)
        self.quantized = quantized
        self._stored = stored
        self._text = text
        self.origin = origin
        self._files = files
        self._opened = opened  # one list for this checkpoint and all that changed() makes of it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the weight files; the second call does nothing."""
        while self._opened:
            self._opened.pop().close()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor as C-contiguous float32; a vector's rows are its elements.

        Memory is bounded by the rows asked for.

        Args:
            name: a key of :attr:`tensors`.
            start: first row.
            stop: row after the last one; None reads to the end.

        Raises:
            CheckpointError: the file cannot be read to that point.
        """
        tensor = self._stored[name]
        last = tensor.info.shape[0] if stop is None else stop
        assert 0 <= start <= last <= tensor.info.shape[0], (name, start, stop)
        return tensor.rows(start, last)

    def stored(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self._stored[name]

    def changed(self, tensors: Mapping[str, Tensor], files: Mapping[str, Path], notes: Sequence[str]) -> Checkpoint:
        """This checkpoint with other tensors in the place of some; closing either closes the files of both.

        Args:
            tensors: by the names of those they replace, of the same shapes.
            files: what they were made of, beside the files of this checkpoint, by the names that the manifest gives.
            notes: what the user should know about it, one sentence each.
        """
        return Checkpoint(
            config=self.config,
            generation=self.generation,
            stored={**self._stored, **tensors},
            opened=self._opened,
            text=self._text,
            origin=self.origin,
            files={**self._files, **files},
            notes=[*self.notes, *notes],
            quantized=self.quantized,
        )

    def tokenizer_json(self) -> bytes:
        """The tokenizer in the format of the ``tokenizers`` library."""
        return self._text.tokenizer_json

    def chat_template(self) -> str | None:
        """The Jinja chat template, if the checkpoint has one."""
        return self._text.chat_template

    def vocab_ids(self) -> int:
        """Number of ids the tokenizer can produce; the logits beyond are padding."""
        return self._text.num_ids

    @property
    def num_file_bytes(self) -> int:
        """Bytes that :meth:`hash_files` will read."""
        return sum(path.stat().st_size for path in self._files.values())

    def hash_files(self, progress: Callable[[int], None] | None = None) -> Source:
        """Describe the source, with the SHA-256 of every file that was read.

        Args:
            progress: called with the number of bytes hashed since the last call.

        Raises:
            CheckpointError: a file cannot be read any more.
        """
        hashes = {name: sha256_file(path, progress=progress) for name, path in self._files.items()}
        origin = self.origin
        return Source(kind=origin.kind, location=origin.location, revision=origin.revision, sha256=hashes)


def open_checkpoint(path: Path, *, origin: Origin | None = None) -> Checkpoint:
    """Open a Hugging Face folder or a GGUF file.

    Args:
        path: the folder, or the ``.gguf`` file.
        origin: where it came from, when that is not the path itself.

    Raises:
        CheckpointError: it is missing, damaged, or not a checkpoint that can be read.
    """
    # The readers build on this module, and a folder needs no gguf package.
    if path.is_dir():
        from export.safetensors_checkpoint import open_folder  # noqa: PLC0415 - see above

        return open_folder(path, origin or Origin("folder", path.resolve().name))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", hint="give a Hugging Face folder or a GGUF file")
    if path.suffix.lower() != ".gguf":
        hint = "give the folder that holds config.json and *.safetensors, or a .gguf file"
        raise CheckpointError(f"{path} is neither a folder nor a GGUF file", hint=hint)
    from export.gguf_checkpoint import open_gguf  # noqa: PLC0415 - see above

    return open_gguf(path, origin or Origin("gguf", path.name))
