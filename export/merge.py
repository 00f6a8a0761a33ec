"""LoRA adapters as PEFT saves them, merged into a checkpoint: ``W + scale * B A`` takes the place of ``W``.

The sum is made where rows are read, in float32, whatever the checkpoint stores: no merged copy of the model is written,
and nothing is rounded before the recipe does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.adapter import CONFIG, TENSORS, read_adapter, read_config
from edge.errors import ConfigError
from export.architectures import architecture_for
from export.checkpoint import Checkpoint, Tensor, TensorInfo
from export.files import WeightFile
from export.lora import projection_names, projection_sizes


def merge_adapters(checkpoint: Checkpoint, folders: Sequence[Path]) -> Checkpoint:
    """A checkpoint whose matrices are those of ``checkpoint`` with adapters added; both read the same open files.

    Args:
        checkpoint: the open source. Matrices that it has as integers are read as floats where an adapter changes them.
        folders: of the adapters, each merged at its full strength, in this order.

    Raises:
        AdapterError: an adapter is damaged, of an unsupported kind, or made for another model.
        CheckpointError: the checkpoint does not match its config.
        ConfigError: two folders have one name, by which the manifest could not tell them apart.
    """
    architecture = architecture_for(checkpoint.config)
    architecture.check({name: info.shape for name, info in checkpoint.tensors.items()})
    names, sizes = projection_names(architecture), projection_sizes(architecture)
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    notes = []
    for folder in folders:
        title = folder.resolve().name
        if f"{title}/{TENSORS}" in files:
            raise ConfigError(f"two adapters are named {title}", hint="rename a folder", param="merge")
        config = read_config(folder / CONFIG)
        adapter = read_adapter(folder / TENSORS, config, sizes)
        for place, (a, b) in adapter.pairs.items():
            name = names[place]
            tensors[name] = _Merged(tensors.get(name, checkpoint.stored(name)), a, b)
        files |= {f"{title}/{file}": folder / file for file in (CONFIG, TENSORS)}
        notes.append(f"the adapter {title} of rank {config.rank} is merged into {len(adapter.pairs)} matrices")
    return checkpoint.changed(tensors, files, notes)


@dataclass(frozen=True, eq=False)
class _Merged:
    """A matrix with an adapter in it."""

    original: Tensor
    a: NDArray[np.float32]  # [rank, in]
    b: NDArray[np.float32]  # [out, rank], with the adapter's scale in it

    @property
    def info(self) -> TensorInfo:
        return self.original.info

    @property
    def file(self) -> WeightFile:
        return self.original.file

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        values = self.original.rows(start, stop)
        values += self.b[start:stop] @ self.a
        return values
