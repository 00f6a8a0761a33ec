"""The text part of a checkpoint that also sees, as Qwen3.5 does.

What is left reads like a checkpoint of text alone: one flat config, and tensors named ``model.layers.…``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from edge.errors import CheckpointError

_FAMILY = "qwen3_5"
_TEXT_PREFIX = "model.language_model."
_VISION_PREFIX = "model.visual."

Stored = TypeVar("Stored")


def text_config(config: Mapping[str, Any], keep: str = "") -> dict[str, Any]:
    """The config of the text part: ``text_config`` where there is one, with what only the outer config says.

    Args:
        config: config.json.
        keep: the one object of the outer config that is not of another part.

    Raises:
        CheckpointError: ``text_config`` is no object.
    """
    inner = config.get("text_config")
    if inner is None:
        return dict(config)
    if not isinstance(inner, Mapping):
        raise CheckpointError("config.json: text_config is not an object", hint="check config.json")
    return {**{key: value for key, value in config.items() if key == keep or not key.endswith("_config")}, **inner}


def text_tensors(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of the text part under the names of a text model, and a note on those of vision, which are skipped.

    Args:
        config: of the text part.
        stored: every tensor of the checkpoint by name.

    Raises:
        CheckpointError: two tensors would get one name.
    """
    if not str(config.get("model_type", "")).startswith(_FAMILY):
        return dict(stored), []
    kept: dict[str, Stored] = {}
    text = {name: tensor for name, tensor in stored.items() if not name.startswith(_VISION_PREFIX)}
    for name, tensor in text.items():
        short = f"model.{name.removeprefix(_TEXT_PREFIX)}" if name.startswith(_TEXT_PREFIX) else name
        if short in kept:
            raise CheckpointError(f"tensor {short} stands there twice, as {name} too", hint="fetch the files again")
        kept[short] = tensor
    count = len(stored) - len(text)
    return kept, [f"only the text part is exported: {count} tensors of vision are skipped"] if count else []
