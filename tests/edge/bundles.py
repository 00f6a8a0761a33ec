"""Bundles that hold no model: for what handles files and never loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edge import __version__
from edge.bundle import (
    GENERATION,
    GRAPH,
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
    WEIGHTS,
    KVLayout,
    Manifest,
    Source,
    hash_file,
)

FILES = {
    GRAPH: b"graph" * 9,
    WEIGHTS: bytes(range(256)) * 8192,
    TOKENIZER: b"{}",
    GENERATION: b"{}\n",
    "extra.txt": b"",
}
"""The weights are longer than what is read at once."""


def write_files(folder: Path, files: Mapping[str, bytes] = FILES, *, name: str = "tiny", counter: int = 0) -> Manifest:
    """Write all files of a bundle but its manifest, which is given back."""
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        version="1",
        counter=counter,
        model_type="qwen2",
        parameter_count=7,
        recipe={"name": "balanced"},
        context_length=64,
        vocab_size=8,
        padded_vocab_size=16,
        kv=KVLayout(layers=3, kv_heads=2, head_dim=64),
        weight_bytes_per_token=5,
        source=Source(kind="folder", location="tiny"),
        files=[hash_file(folder / file) for file in files],
        min_runtime_version=__version__,
    )


def write_bundle(folder: Path, files: Mapping[str, bytes] = FILES, *, name: str = "tiny", counter: int = 0) -> Path:
    """Write a bundle that verifies."""
    manifest = write_files(folder, files, name=name, counter=counter)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
    return folder
