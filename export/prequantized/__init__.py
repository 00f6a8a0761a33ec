"""Checkpoints that are quantized already: ``quantization_config`` of config.json says how, one file per method.

What a method stores as integers on a grid becomes a :class:`export.prequantized.grid.GridTensor`, whose integers an
export keeps; read as rows, every tensor is what the method's own library would make of it, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge.errors import CheckpointError
from export.checkpoint import StoredTensor, Tensor
from export.files import shown
from export.prequantized.awq import read_awq
from export.prequantized.compressed import read_compressed
from export.prequantized.fp8 import read_fp8
from export.prequantized.gptq import read_gptq

Reader = Callable[[Mapping[str, Any], Mapping[str, StoredTensor]], dict[str, Tensor]]
"""From ``quantization_config`` and the tensors of the files to tensors as if nothing were quantized."""
METHODS: Mapping[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "fp8": read_fp8,
    "compressed-tensors": read_compressed,
}
"""By ``quant_method``."""
_HINT = "use the original BF16 checkpoint, or a GGUF"


def read_quantized(settings: Any, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors of a quantized checkpoint under the names of the original.

    Args:
        settings: ``quantization_config``.
        stored: every tensor of the files.

    Raises:
        CheckpointError: the method is not supported, or its tensors do not fit together.
    """
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"quantization_config is no object but {shown(settings)}", hint="check config.json")
    method = settings.get("quant_method", "unknown")
    if not isinstance(method, str) or method not in METHODS:
        hint = f"supported: {', '.join(METHODS)}; else {_HINT}"
        raise CheckpointError(f"quantized with {shown(method)}, which is not supported", hint=hint)
    tensors = METHODS[method](settings, stored)
    if tensors.keys() == stored.keys():
        hint = "take quantization_config out of config.json if this is so"
        raise CheckpointError(f"config.json says that weights are quantized with {method}, but none are", hint=hint)
    return tensors
