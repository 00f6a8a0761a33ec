"""The bundle: a folder that holds one quantized model and everything needed to serve it.

``docs/bundle-format.md`` describes it for people. The manifest lists every other file with its size and SHA-256;
:func:`verify_bundle` refuses a folder in which a byte changed, a file is missing, or a file is there that the manifest
does not list, before onnxruntime opens anything (onnxruntime itself has no integrity check).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge import __version__
from edge.errors import BundleError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation.json"
REQUIRED_FILES = frozenset({GRAPH, WEIGHTS, TOKENIZER, GENERATION})
MAX_MANIFEST_BYTES = 1 << 20
_CHUNK = 16 << 20
"""Bytes hashed at a time: a thread that hashes while another one imports waits milliseconds for Python after each."""

CacheType = Literal["float32", "int8"]
"""Number formats of the attention cache."""
_ITEM_BYTES: dict[CacheType, int] = {"float32": 4, "int8": 1}

Progress = Callable[[int], None]
"""Called with the number of bytes handled since the last call."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Model):
    """One file of the bundle."""

    path: str
    """A plain file name: no directory, no ``..``."""
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value in {"", ".", "..", MANIFEST} or "/" in value or "\\" in value or "\0" in value:
            raise ValueError("must be a plain file name")
        return value


class Source(_Model):
    """Where the weights came from."""

    kind: str
    """``folder``, ``gguf``, ``hub`` or ``catalog``."""
    location: str
    """File or folder name, hub id or catalog name; never a full path of the exporting machine."""
    revision: str | None = None
    sha256: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each source file, by file name."""


class KVLayout(_Model):
    """Shape of the attention cache: per layer two arrays [slots, kv_heads, context, head_dim]."""

    layers: Annotated[int, Field(gt=0)]
    """Layers that have a cache: those of full attention."""
    kv_heads: Annotated[int, Field(gt=0)]
    head_dim: Annotated[int, Field(gt=0)]
    dtype: CacheType = "float32"

    @property
    def bytes_per_token(self) -> int:
        """Bytes of cache that one token of one sequence occupies."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _ITEM_BYTES[self.dtype]


class StateLayout(_Model):
    """Shape of the state of linear attention: per layer one array of the convolution and one of the recurrence.

    Both are float32 and of one size however long the sequence: [slots, conv_channels, conv_kernel] and
    [slots, value_heads, key_dim, value_dim]. A sequence starts with zeros.
    """

    layers: Annotated[int, Field(gt=0)]
    """Layers of linear attention."""
    conv_channels: Annotated[int, Field(gt=0)]
    conv_kernel: Annotated[int, Field(gt=0)]
    """Positions that the convolution remembers: its kernel's width less one."""
    value_heads: Annotated[int, Field(gt=0)]
    key_dim: Annotated[int, Field(gt=0)]
    value_dim: Annotated[int, Field(gt=0)]

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of state of one sequence."""
        recurrent = self.value_heads * self.key_dim * self.value_dim
        return 4 * self.layers * (self.conv_channels * self.conv_kernel + recurrent)


class AdapterEntry(_Model):
    """One LoRA adapter of the bundle."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    """Requests choose it as ``MODEL:NAME``."""
    file: str
    """Its tensors as PEFT saved them; one of the bundle's files."""
    rank: Annotated[int, Field(gt=0)]
    scale: Annotated[float, Field(allow_inf_nan=False)]
    """Factor of the product of its matrices."""


class Manifest(_Model):
    """What a bundle is, where it came from, and what was measured of it."""

    schema_version: int
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,95}$")]
    """The model name that requests use."""
    version: str
    model_type: str
    """The checkpoint's ``model_type``: ``qwen2``, ``qwen3``, ``qwen3_5``."""
    parameter_count: Annotated[int, Field(gt=0)]
    """Parameters; tied tables count once."""
    recipe: dict[str, Any]
    """Name and table of the quantization recipe."""
    context_length: Annotated[int, Field(gt=0)]
    """Tokens; positions the graph has rotary tables for."""
    vocab_size: Annotated[int, Field(gt=0)]
    """Ids the tokenizer can produce; logits beyond are padding and never sampled."""
    padded_vocab_size: Annotated[int, Field(gt=0)]
    """Width of the logits."""
    kv: KVLayout
    state: StateLayout | None = None
    """What the layers of linear attention remember; None where every layer has full attention."""
    weight_bytes_per_token: Annotated[int, Field(gt=0)]
    """Bytes of weights that one decode step reads from disk layout (codes, scales, zero points)."""
    row_multiple: Annotated[int, Field(ge=1, le=8)] = 1
    """Rows that a product must have a multiple of, for a row to be rounded alike in every one."""
    source: Source
    files: list[FileEntry]
    adapters: list[AdapterEntry] = Field(default_factory=list)
    """LoRA adapters; where there are any, the graph has places for more."""
    min_runtime_version: Annotated[str, Field(pattern=r"^\d+(\.\d+){0,2}$")]
    measured: dict[str, Any] = Field(default_factory=dict)
    """What the export's verification measured."""
    licence: str | None = None

    @field_validator("files")
    @classmethod
    def _complete(cls, value: list[FileEntry]) -> list[FileEntry]:
        names = [entry.path for entry in value]
        if len(set(names)) != len(names):
            raise ValueError("lists a file twice")
        if missing := REQUIRED_FILES - set(names):
            raise ValueError(f"does not list {', '.join(sorted(missing))}")
        return value

    @model_validator(mode="after")
    def _adapters_are_there(self) -> Self:
        names = [adapter.name for adapter in self.adapters]
        if len(set(names)) != len(names):
            raise ValueError("lists an adapter twice")
        if missing := {adapter.file for adapter in self.adapters} - {entry.path for entry in self.files}:
            raise ValueError(f"does not list {', '.join(sorted(missing))}")
        return self


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` alone; the files are not touched.

    Raises:
        BundleError: there is no manifest, it is malformed, or it needs a newer runtime.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes", hint="this is not a qwedge bundle")
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        hint = "make one with: qwedge export MODEL -o DIR"
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}", hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint="export or copy the bundle again") from None
    if isinstance(raw, dict) and raw.get("schema_version") != SCHEMA_VERSION:
        version = raw.get("schema_version")
        hint = f"this runtime reads schema {SCHEMA_VERSION}; install a matching qwedge or export again"
        raise BundleError(f"{path} has schema_version {version!r}", hint=hint)
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise BundleError(f"{path} is malformed at {where}: {first['msg']}", hint="export the bundle again") from None
    if _version(manifest.min_runtime_version) > _version(__version__):
        raise BundleError(
            f"the bundle needs qwedge {manifest.min_runtime_version}, this is {__version__}", hint="update qwedge"
        )
    return manifest


def verify_bundle(folder: Path, *, progress: Progress | None = None) -> Manifest:
    """Check every file of a bundle against its manifest.

    Args:
        folder: the bundle.
        progress: called with bytes hashed since the last call.

    Returns:
        The manifest.

    Raises:
        BundleError: a file is missing, extra, not a regular file, of another size, or its SHA-256 differs.
    """
    manifest = read_manifest(folder)
    listed = {entry.path for entry in manifest.files}
    hint = "the copy is damaged or was changed: copy or export the bundle again"
    if extra := sorted({path.name for path in folder.iterdir()} - listed - {MANIFEST}):
        raise BundleError(f"{folder} holds a file that its manifest does not list: {extra[0]}", hint=hint)
    for entry in manifest.files:
        _verify_file(folder / entry.path, entry, hint, progress)
    return manifest


def hash_file(path: Path, *, progress: Progress | None = None) -> FileEntry:
    """Size and SHA-256 of a regular file, without following links.

    Raises:
        OSError: the file cannot be opened.
        BundleError: it is a link, a hard link, or no regular file.
    """
    with _open_regular(path) as file:
        digest, size = hashlib.sha256(), 0
        chunk = memoryview(bytearray(min(_CHUNK, os.fstat(file.fileno()).st_size + 1)))
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            size += count
            if progress is not None:
                progress(count)
    return FileEntry(path=path.name, size=size, sha256=digest.hexdigest())


def publish_bundle(staging: Path, destination: Path, manifest: Manifest) -> None:
    """Write the manifest into ``staging`` and move the finished folder to ``destination``, surviving a power cut.

    Files are flushed to disk first, then the folder is renamed, then its parent is flushed: after a crash there is
    either the whole bundle or nothing under its name (docs/bundle-format.md).

    Raises:
        BundleError: ``destination`` exists already.
        OSError: the disk refused.
    """
    with (staging / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest.model_dump(mode="json"), file, indent=2, ensure_ascii=False)
        file.write("\n")
    for path in staging.iterdir():
        _fsync(path)
    _fsync(staging)
    if destination.exists():
        raise BundleError(f"{destination} exists already", hint="choose another folder or remove it first")
    staging.rename(destination)
    _fsync(destination.parent)


def _verify_file(path: Path, entry: FileEntry, hint: str, progress: Progress | None) -> None:
    try:
        # The size first: it costs nothing and catches most damage.
        size = path.lstat().st_size
        if size != entry.size:
            raise BundleError(f"{path} has {size} bytes, the manifest says {entry.size}", hint=hint)
        found = hash_file(path, progress=progress)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing", hint=hint) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    if found.sha256 != entry.sha256:
        raise BundleError(f"{path} was changed: its SHA-256 is not the manifest's", hint=hint)


def _open_regular(path: Path) -> Any:
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        os.close(descriptor)
        raise BundleError(
            f"{path} is not a plain file", hint="bundles hold regular files without hard or symbolic links"
        )
    return os.fdopen(descriptor, "rb", buffering=0)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
