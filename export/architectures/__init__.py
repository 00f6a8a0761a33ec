"""One file per ``model_type``; each says which tensors a model has and how a layer computes.

To add a model: write a subclass of :class:`export.architectures.decoder.Decoder` in a file of its own and name it in
:data:`ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.errors import CheckpointError
from export.architectures.decoder import Decoder
from export.architectures.qwen2 import Qwen2
from export.architectures.qwen3 import Qwen3
from export.architectures.qwen3_5 import Qwen3_5

ARCHITECTURES: dict[str, type[Decoder]] = {
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_5": Qwen3_5,
    "qwen3_5_text": Qwen3_5,
}


def architecture_for(config: Mapping[str, Any]) -> Decoder:
    """The architecture of a checkpoint's ``config.json``.

    Raises:
        CheckpointError: the model type is unknown, or the config lacks a field or asks for what is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"the model type {model_type!r} is not supported", hint=f"supported: {known}")
    return ARCHITECTURES[model_type](config)
