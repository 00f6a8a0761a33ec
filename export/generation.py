"""Generation defaults: from generation_config.json, config.json, or what the catalog knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edge.errors import CheckpointError
from export.checkpoint import GenerationDefaults
from export.files import shown

END_OF_TURN = "<|im_end|>"
"""Ends a turn of every Qwen chat model, whatever its config calls eos."""
_HINT = "correct the file, or fetch it again"


def generation_defaults(
    generation: Mapping[str, Any], config: Mapping[str, Any], *, also_stop: Iterable[int] = ()
) -> GenerationDefaults:
    """Collect the defaults; a value in ``generation`` wins over one in ``config``.

    Args:
        generation: keys of generation_config.json; may be empty.
        config: keys of config.json.
        also_stop: ids to stop at beside the ones the files name.

    Raises:
        CheckpointError: a value has the wrong type or is out of range, or nothing says where the model stops.
    """
    eos = (*_ids("eos_token_id", generation, config), *also_stop)
    if not eos:
        raise CheckpointError("no eos_token_id is given anywhere", hint="add eos_token_id to generation_config.json")
    return GenerationDefaults(
        eos_token_ids=tuple(dict.fromkeys(eos)),
        bos_token_id=_first("bos_token_id", generation, config),
        pad_token_id=_first("pad_token_id", generation, config),
        temperature=_number(generation, "temperature", low=0.0),
        top_p=_number(generation, "top_p", low=0.0, high=1.0),
        top_k=_integer(generation, "top_k"),
        repetition_penalty=_number(generation, "repetition_penalty", low=1e-6),
        do_sample=generation.get("do_sample") is True,
    )


def _ids(key: str, *sources: Mapping[str, Any]) -> tuple[int, ...]:
    value: Any = next((source[key] for source in sources if source.get(key) is not None), [])
    ids = value if isinstance(value, list) else [value]
    if not all(_is_integer(each) and each >= 0 for each in ids):
        raise CheckpointError(f"{key} is {shown(value)}, not a token id or a list of them", hint=_HINT)
    return tuple(ids)


def _first(key: str, *sources: Mapping[str, Any]) -> int | None:
    return next(iter(_ids(key, *sources)), None)


def _integer(source: Mapping[str, Any], key: str) -> int | None:
    value = source.get(key)
    if value is None or (_is_integer(value) and value >= 0):
        return value
    raise CheckpointError(f"{key} is {shown(value)}, not a whole number from 0", hint=_HINT)


def _number(source: Mapping[str, Any], key: str, *, low: float, high: float = 1e6) -> float | None:
    value = source.get(key)
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
        return float(value)
    raise CheckpointError(f"{key} is {shown(value)}, not a number from {low:g} to {high:g}", hint=_HINT)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
