"""The bundle: a folder that holds one quantized model and everything needed to serve it.

``docs/bundle-format.md`` describes it for people. The manifest lists every other file with its size and SHA-256;
:func:`verify_bundle` refuses a folder in which a byte changed, a file is missing, or a file is there that the manifest
does not list, before onnxruntime opens anything (onnxruntime itself has no integrity check).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge import __version__
from edge.durable import fsync_path, replace_durably
from edge.errors import BundleError

if TYPE_CHECKING:  # this brings the cryptography, which only those need who sign or trust
    from edge.signing import PrivateKey, Trust

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation.json"
REQUIRED_FILES = frozenset({GRAPH, WEIGHTS, TOKENIZER, GENERATION})
MAX_MANIFEST_BYTES = 1 << 20
MAX_SIGNATURE_BYTES = 1 << 12
_CHUNK = 16 << 20
"""Bytes hashed at a time: a thread that hashes while another one imports waits milliseconds for Python after each."""

CacheType = Literal["float32", "float16", "int8"]
"""Number formats of the attention cache."""
_ITEM_BYTES: dict[CacheType, int] = {"float32": 4, "float16": 2, "int8": 1}
Target = Literal["cpu", "cuda", "webgpu"]
"""What a graph is made for: processors, NVIDIA's GPUs, or GPUs with Vulkan (docs/gpu.md)."""

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
        if value in {"", ".", "..", MANIFEST, SIGNATURE} or "/" in value or "\\" in value or "\0" in value:
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
    counter: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Grows where older bundles of this name must not come back: a device refuses lower ones (docs/model-store.md)."""
    model_type: str
    """The checkpoint's ``model_type``: ``qwen2``, ``qwen3``, ``qwen3_5``."""
    parameter_count: Annotated[int, Field(gt=0)]
    """Parameters; tied tables count once."""
    recipe: dict[str, Any]
    """Name and table of the quantization recipe."""
    target: Target = "cpu"
    """What the graph was made for: nothing else can run it."""
    context_length: Annotated[int, Field(gt=0)]
    """Tokens; positions the graph has rotary tables for."""
    vocab_size: Annotated[int, Field(gt=0)]
    """Ids the tokenizer can produce; logits beyond are padding and never sampled."""
    padded_vocab_size: Annotated[int, Field(gt=0)]
    """Width of the logits."""
    hidden_size: Annotated[int, Field(gt=0)] | None = None
    """Width of the output ``hidden_states``, which embeddings are made of; None where the graph has none."""
    kv: KVLayout
    state: StateLayout | None = None
    """What the layers of linear attention remember; None where every layer has full attention."""
    weight_bytes_per_token: Annotated[int, Field(gt=0)]
    """Bytes of weights that one decode step reads from disk layout (codes, scales, zero points)."""
    row_multiple: Annotated[int, Field(ge=1, le=8)] = 1
    """Rows that a product must have a multiple of, for a row to be rounded alike in every one."""
    source: Source
    tools: dict[str, str] = Field(default_factory=dict)
    """Versions of what made the bundle."""
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
    def _target_can_run_it(self) -> Self:
        if self.target != "cpu" and (self.state or self.adapters or self.kv.dtype == "int8"):
            raise ValueError(f"no graph for {self.target} has states, adapters or an int8 cache")
        return self

    @model_validator(mode="after")
    def _adapters_are_there(self) -> Self:
        names = [adapter.name for adapter in self.adapters]
        if len(set(names)) != len(names):
            raise ValueError("lists an adapter twice")
        if missing := {adapter.file for adapter in self.adapters} - {entry.path for entry in self.files}:
            raise ValueError(f"does not list {', '.join(sorted(missing))}")
        return self


def read_manifest(folder: Path, *, trust: Trust | None = None) -> Manifest:
    """Read and check ``manifest.json`` and, where there is ``trust``, its signature; the files are not touched.

    Raises:
        BundleError: there is no manifest, it is malformed, or it needs a newer runtime.
        SignatureError: no trusted key signed it.
    """
    raw = read_manifest_bytes(folder)
    if trust is not None:
        trust.check(raw, read_signature(folder), str(folder))
    return parse_manifest(raw, folder / MANIFEST)


def read_manifest_bytes(folder: Path) -> bytes:
    """``manifest.json`` as it lies there.

    Raises:
        BundleError: there is none, or it cannot be read.
    """
    raw = _read_small(folder / MANIFEST, MAX_MANIFEST_BYTES)
    if raw is None:
        hint = "make one with: qwedge export MODEL -o DIR"
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}", hint=hint)
    return raw


def read_signature(folder: Path) -> bytes | None:
    """``manifest.sig`` as it lies there; None where there is none.

    Raises:
        BundleError: it cannot be read.
    """
    return _read_small(folder / SIGNATURE, MAX_SIGNATURE_BYTES)


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Check a manifest.

    Args:
        data: the bytes of ``manifest.json``.
        path: where they come from, for messages.

    Raises:
        BundleError: it is malformed, or needs a newer runtime.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
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


def verify_bundle(folder: Path, *, trust: Trust | None = None, progress: Progress | None = None) -> Manifest:
    """Check every file of a bundle against its manifest.

    Args:
        folder: the bundle.
        trust: the keys of which one must have signed the manifest; None = the signature is not looked at.
        progress: called with bytes hashed since the last call.

    Returns:
        The manifest.

    Raises:
        BundleError: a file is missing, extra, not a regular file, of another size, or its SHA-256 differs.
        SignatureError: no trusted key signed it.
    """
    manifest = read_manifest(folder, trust=trust)
    listed = {entry.path for entry in manifest.files}
    hint = "the copy is damaged or was changed: copy or export the bundle again"
    if extra := sorted({path.name for path in folder.iterdir()} - listed - {MANIFEST, SIGNATURE}):
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
    with open_regular(path) as file:
        digest, size = hashlib.sha256(), 0
        chunk = memoryview(bytearray(min(_CHUNK, os.fstat(file.fileno()).st_size + 1)))
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            size += count
            if progress is not None:
                progress(count)
    return FileEntry(path=path.name, size=size, sha256=digest.hexdigest())


def publish_bundle(staging: Path, destination: Path, manifest: Manifest, *, key: PrivateKey | None = None) -> None:
    """Write the manifest into ``staging`` and move the finished folder to ``destination``, surviving a power cut.

    Files are flushed to disk first, then the folder is renamed, then its parent is flushed: after a crash there is
    either the whole bundle or nothing under its name (docs/bundle-format.md).

    Args:
        staging: a folder with all files of the manifest.
        destination: the bundle's folder.
        manifest: what the bundle is.
        key: signs the manifest; None = the bundle is not signed.

    Raises:
        BundleError: ``destination`` exists already.
        OSError: the disk refused.
    """
    raw = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False).encode() + b"\n"
    (staging / MANIFEST).write_bytes(raw)
    if key is not None:
        (staging / SIGNATURE).write_bytes(key.sign(raw))
    for path in staging.iterdir():
        fsync_path(path)
    move_durably(staging, destination)


def sign_bundle(folder: Path, key: PrivateKey, *, progress: Progress | None = None) -> Manifest:
    """Verify the files and write ``manifest.sig``, in place of one that may be there.

    Raises:
        BundleError: the bundle is damaged.
        OSError: the disk refused.
    """
    manifest = verify_bundle(folder, progress=progress)
    raw = read_manifest_bytes(folder)
    replace_durably(folder / SIGNATURE, key.sign(raw))
    return manifest


def move_durably(staging: Path, destination: Path) -> None:
    """Give a folder whose files are on disk its final name, surviving a power cut.

    Raises:
        BundleError: ``destination`` exists already.
        OSError: the disk refused.
    """
    fsync_path(staging)
    if destination.exists():
        raise BundleError(f"{destination} exists already", hint="choose another folder or remove it first")
    staging.rename(destination)
    fsync_path(destination.parent)


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


def open_regular(path: Path) -> FileIO:
    """Open a plain file for reading, unbuffered, without following links.

    Its only other names may be those in the bundles beside its own: an installed bundle shares with them what they have
    in common (docs/model-store.md).

    Raises:
        OSError: it cannot be opened.
        BundleError: it is a link, has a name elsewhere, or is no regular file.
    """
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or (info.st_nlink != 1 and info.st_nlink != _names_beside(path, info)):
        os.close(descriptor)
        raise BundleError(
            f"{path} is not a plain file", hint="bundles hold regular files without hard or symbolic links"
        )
    return os.fdopen(descriptor, "rb", buffering=0)


def _names_beside(path: Path, info: os.stat_result) -> int:
    """How many bundles, this one and those beside it, have this file under this name."""
    count = 0
    for other in path.absolute().parent.parent.glob(f"*/{glob.escape(path.name)}"):
        with suppress(FileNotFoundError):  # a bundle that is being removed
            count += os.path.samestat(other.lstat(), info)
    return count


def _read_small(path: Path, most: int) -> bytes | None:
    """A whole file of at most ``most`` bytes; None where there is none.

    Raises:
        BundleError: it is larger, no plain file, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            data = b"".join(iter(lambda: file.read(most + 1 - file.tell()), b""))
    except FileNotFoundError:
        return None
    except OSError as error:
        hint = "export or copy the bundle again"
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    if len(data) > most:
        raise BundleError(f"{path} is larger than {most} bytes", hint="this is not a qwedge bundle")
    return data


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
