"""The catalog: models that can be exported by name, with what is known and pinned about each (catalog.toml)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sampling(_Model):
    """The makers' generation settings; None leaves the runtime's default."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float | None = None


class Piece(_Model):
    """One package on the package index that carries one consecutive part of a file."""

    package: str
    version: str
    wheel_sha256: Sha256
    member: str
    """Path inside the wheel."""
    size: int
    """Bytes of the part."""
    sha256: Sha256
    """Of the part."""


class CatalogEntry(_Model):
    """One model."""

    name: str
    hub: str
    """Repository id on the hub."""
    file: str | None = None
    """The GGUF to take from it; None takes config, tokenizer and safetensors."""
    revision: str | None = None
    """Commit of the repository, where pinned."""
    size: int | None = None
    """Bytes of the weights, where known."""
    sha256: Sha256 | None = None
    """SHA-256 of ``file``, where pinned."""
    parameters: int
    """Parameters; tied tables count once."""
    licence: str
    """``apache-2.0`` or ``qwen-research`` (not for commercial use)."""
    generation: Sampling
    note: str
    pieces: tuple[Piece, ...] = ()
    """A second source for ``file``, in order."""

    @property
    def download_bytes(self) -> int:
        """Bytes to download; where unknown an estimate, two for each parameter."""
        return self.size if self.size is not None else 2 * self.parameters


FAMILY_SAMPLING: Mapping[str, Sampling] = {
    "qwen2": Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
    "qwen3": Sampling(temperature=0.6, top_p=0.95, top_k=20),
    "qwen3_5": Sampling(temperature=0.7, top_p=0.8, top_k=20),
    "qwen3_5_text": Sampling(temperature=0.7, top_p=0.8, top_k=20),
}
"""``model_type`` → settings for a checkpoint without any whose model is not in the catalog."""


@cache
def catalog() -> Mapping[str, CatalogEntry]:
    """Every entry by name, in the order of the file."""
    models = tomllib.loads((files("export") / "catalog.toml").read_text("utf-8"))["models"]
    return {name: CatalogEntry(name=name, **fields) for name, fields in models.items()}


def find_by_title(title: str) -> CatalogEntry | None:
    """The entry that a GGUF's ``general.name`` speaks of, such as ``Qwen2.5 Coder 0.5B Instruct GGUF``."""
    name = "-".join(title.lower().split())
    matches = [entry for entry in catalog().values() if name == entry.name or name.startswith(f"{entry.name}-")]
    return max(matches, key=lambda entry: len(entry.name), default=None)
