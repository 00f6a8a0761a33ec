"""The manifest: what a bundle is, where it came from, and which files belong to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge import __version__
from edge.errors import BundleError

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

CacheType = Literal["float32", "float16", "int8"]
"""Number formats of the attention cache."""
_ITEM_BYTES: dict[CacheType, int] = {"float32": 4, "float16": 2, "int8": 1}
Target = Literal["cpu", "cuda", "webgpu"]
"""What a graph is made for: processors, NVIDIA's GPUs, or GPUs with Vulkan (docs/gpu.md)."""
EXACT_BLOCKS = {4: 32, 8: 64}
"""By bits, the largest blocks with which a row has the same bits in every product (docs/lab-notes.md)."""


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


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
