"""LoRA adapters (Hu et al. 2021): places for them in a graph, inputs beside every linear, and their files in a bundle.

Adapters are cut into groups of ``width`` columns (zeros fill the last one up); each row of the batch chooses groups. So
rows with different adapters, and with none, share a step. For the projections that are stacked in one linear, such as
``q_proj+k_proj+v_proj`` = ``{linear}``, and for each of them by itself, the inputs are

=================================  ==================================  ================================================
input                              shape                               meaning
=================================  ==================================  ================================================
``lora.{linear}.groups``           [groups, batch, 1, 1] float32       1 where the row's adapter owns the group, else 0;
                                                                       of all layers
``lora.{layer}.{linear}.a``        [projections, groups, 1, in,        A, transposed
                                   width] float32
``lora.{layer}.{projection}.b``    [groups * width, out] float32       B, transposed, with the adapter's scale in it
=================================  ==================================  ================================================

No adapters are one group of width 0.

A row's bits do not depend on the other rows of a step or on their adapters. onnxruntime multiplies a single row in
another order than several, but with ``alpha`` 1 only: so it is 2 in one product and 1/2 in the other. And threads that
share the columns of a product sum in another order than one does, but they share no fewer than 16: so ``width`` is at
most 16.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from edge.adapter import CONFIG, NAME, TENSORS, Place, read_adapter, read_config
from edge.bundle import AdapterEntry
from edge.errors import ConfigError
from export.architectures.decoder import Decoder
from export.graph import GraphBuilder

_PROJECTION = re.compile(r"model\.layers\.(\d+)\.\w+\.(\w+_proj|in_proj_\w+)\.weight")


class LoraPlaces:
    """Adds the places to linears."""

    def __init__(self) -> None:
        self._groups: dict[str, ir.Value] = {}

    def adapt(self, graph: GraphBuilder, x: ir.Value, product: ir.Value, sources: Sequence[str]) -> ir.Value:
        """``product`` of the projections ``sources`` plus what adapters make of their input ``x``."""
        layer = sources[0].split(".")[2]
        projections = [source.split(".")[-2] for source in sources]
        linear = "+".join(projections)
        columns = graph.weights.shape(sources[0])[1]
        inner = self._inner(graph, x, layer, linear, [len(sources), f"{linear}.groups", 1, columns, f"{linear}.width"])
        parts = []
        for own, projection, source in zip(_split(graph, inner, len(sources)), projections, sources, strict=True):
            shape: list[int | str] = [f"{linear}.rank", graph.weights.shape(source)[0]]
            b = graph.input(f"lora.{layer}.{projection}.b", ir.DataType.FLOAT, shape)
            parts.append(graph.op("FusedMatMul", [own, b], contrib=True, alpha=0.5))
        change = graph.op("Concat", parts, axis=-1) if len(parts) > 1 else parts[0]
        return graph.op("Add", [product, change])

    def _inner(self, graph: GraphBuilder, x: ir.Value, layer: str, linear: str, shape: Sequence[int | str]) -> ir.Value:
        """The products with A, zero where a row has not chosen [batch, sequence, projections, groups, width]."""
        if linear not in self._groups:
            name = f"lora.{linear}.groups"
            self._groups[linear] = graph.input(name, ir.DataType.FLOAT, [f"{linear}.groups", "batch", 1, 1])
        a = graph.input(f"lora.{layer}.{linear}.a", ir.DataType.FLOAT, shape)
        inner = graph.op("FusedMatMul", [x, a], contrib=True, alpha=2.0)
        chosen = graph.op("Mul", [inner, self._groups[linear]])
        return graph.op("Transpose", [chosen], perm=[2, 3, 0, 1, 4])


def _split(graph: GraphBuilder, inner: ir.Value, count: int) -> list[ir.Value]:
    """Each projection's part of ``inner`` [batch, sequence, groups * width]."""
    if count == 1:
        return [graph.op("Reshape", [inner, graph.constant("lora.one", [0, 0, -1])])]
    inner = graph.op("Reshape", [inner, graph.constant("lora.several", [0, 0, 0, -1])])
    return [graph.op("Gather", [inner, graph.scalar(f"lora.{index}", index)], axis=2) for index in range(count)]


def copy_adapters(folders: Mapping[str, Path], architecture: Decoder, bundle: Path) -> list[AdapterEntry]:
    """Check adapters as PEFT saved them, and copy their tensors into a bundle that is being made.

    Args:
        folders: by the adapters' names.
        architecture: of the model they belong to.
        bundle: the bundle's folder.

    Raises:
        ConfigError: a name cannot be used.
        AdapterError: an adapter is damaged, of an unsupported kind, or made for another model.
    """
    entries = []
    for name, folder in sorted(folders.items()):
        if not NAME.fullmatch(name):
            hint = "use up to 64 lower-case letters, digits, dots and dashes"
            raise ConfigError(f"{name!r} cannot be an adapter's name", hint=hint, param="adapter")
        config = read_config(folder / CONFIG)
        read_adapter(folder / TENSORS, config, projection_sizes(architecture))
        entry = AdapterEntry(name=name, file=f"adapter.{name}.safetensors", rank=config.rank, scale=config.scale)
        shutil.copyfile(folder / TENSORS, bundle / entry.file)
        entries.append(entry)
    return entries


def projection_names(architecture: Decoder) -> dict[Place, str]:
    """The checkpoint's name of every projection."""
    matches = map(_PROJECTION.fullmatch, architecture.tensors())
    return {(int(match[1]), match[2]): match[0] for match in matches if match}


def projection_sizes(architecture: Decoder) -> dict[Place, tuple[int, int]]:
    """In and out features of every projection."""
    shapes = architecture.tensors()
    return {place: (shapes[name][1], shapes[name][0]) for place, name in projection_names(architecture).items()}
