"""What fits into so much memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from edge.planning.memory import STATES, Serving, kv_bytes, predict_memory
from edge.planning.models import is_known, known_models, known_recipes, shape_of
from edge.planning.shape import Shape

SLOTS = (1, 2, 4, 8)
_SMALLEST_CONTEXT = 512


def fits(shape: Shape, serving: Serving, limit: int, *, int8: bool) -> bool:
    """Whether a model can be served so within ``limit`` bytes, with everything in use."""
    return predict_memory(shape, serving, int8=int8).peak <= limit


def largest_context(shape: Shape, serving: Serving, limit: int, *, int8: bool) -> int | None:
    """The most tokens for each sequence, a power of two or all that the model has; None where nothing fits."""
    sizes = (replace(serving, context=context) for context in reversed(_contexts(shape.context_length)))
    return next((each.context for each in sizes if fits(shape, each, limit, int8=int8)), None)


def contexts_by_slots(shape: Shape, serving: Serving, limit: int, *, int8: bool) -> dict[int, int | None]:
    """The largest context for 1, 2, 4 and 8 sequences at once, and for as many as are asked for."""
    counts = sorted({*SLOTS, serving.slots})
    return {slots: largest_context(shape, replace(serving, slots=slots), limit, int8=int8) for slots in counts}


def cache_budget(shape: Shape, serving: Serving, limit: int, *, int8: bool) -> int | None:
    """The most MiB that the cache may take (``engine.kv_cache_mb``) with everything else in use.

    None where that does not hold a single conversation: requests that find no room wait, but one must be answered.
    """
    work = predict_memory(shape, replace(serving, kv_bytes=0), int8=int8)
    states = sum(part.num_bytes for part in work.work if part.name == STATES)
    room = limit - work.peak
    if room < kv_bytes(shape.kv, serving.context, serving.context):
        return None
    return (room + states) >> 20


def smaller_recipe(shape: Shape, serving: Serving, limit: int, *, int8: bool) -> Shape | None:
    """A known model in the recipe with the most bits that fits; None where none does, or the model is not known."""
    recipes = _quantized() if is_known(shape.name) else []
    return _largest((shape_of(shape.name, recipe) for recipe in recipes), shape, serving, limit, int8=int8)


def smaller_model(shape: Shape, serving: Serving, limit: int, *, int8: bool) -> Shape | None:
    """The known model, in whatever recipe, that reads most of those that fit; None where none does."""
    others = (shape_of(name, recipe) for name in known_models() for recipe in _quantized())
    return _largest(others, shape, serving, limit, int8=int8)


def _quantized() -> list[str]:
    return [name for name, recipe in known_recipes().items() if not recipe.table.form().is_float]


def _largest(others: Iterable[Shape], than: Shape, serving: Serving, limit: int, *, int8: bool) -> Shape | None:
    """The one that reads most, of those that are smaller than a model and fit."""
    smaller = [
        other
        for other in others
        if other.bytes_per_token < than.bytes_per_token and fits(other, serving, limit, int8=int8)
    ]
    return max(smaller, key=lambda other: other.bytes_per_token, default=None)


def _contexts(most: int) -> Sequence[int]:
    powers = [_SMALLEST_CONTEXT << shift for shift in range(most.bit_length()) if _SMALLEST_CONTEXT << shift < most]
    return [*powers, most]
