"""Refuse to load what would be ended by the kernel, and say what would fit.

Nothing is refused that may work: what must fit is the model while it is loaded, and after that a single conversation
up to its context. All slots full at once may never happen, so that only earns a warning.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from edge.errors import ConfigError
from edge.planning.available import Available
from edge.planning.fit import contexts_by_slots, largest_context, smaller_model, smaller_recipe
from edge.planning.memory import Serving, one_conversation, predict_memory
from edge.planning.shape import Shape

log = logging.getLogger(__name__)

_TURN_OFF = 'engine.memory_check = "off" tries it all the same'


def check_memory(shape: Shape, serving: Serving, available: Available, *, int8: bool) -> None:
    """Compare what a model needs with what this process can have.

    Args:
        shape: the model.
        serving: how it is to be served.
        available: what there is; memory that this process has already counts as part of what the model needs.
        int8: whether the processor has kernels for int8 activations.

    Raises:
        ConfigError: the kernel would end the process while it loads the model, or in the first long conversation.
    """
    least = least_memory(shape, serving, int8=int8)
    limit = available.hard + available.resident
    if least > limit:
        need, have = _mb(least), _mb(limit)
        message = f"{shape.name} with a context of {serving.context} tokens needs {need}, but {available.limit} {have}"
        raise ConfigError(message, hint=_advice(shape, serving, limit, int8=int8))
    most = predict_memory(shape, serving, int8=int8).peak
    soft = available.soft + available.resident
    if most > soft:
        found = contexts_by_slots(shape, serving, soft, int8=int8)
        fitting = ", ".join(f"{slots} of {context}" for slots, context in found.items() if context is not None)
        log.warning(
            "memory is short: %s with %d slots full of %d tokens would take %s of %s; what fits, slots of tokens: %s",
            shape.name,
            serving.slots,
            serving.context,
            _mb(most),
            _mb(soft),
            fitting or "none",
        )


def least_memory(shape: Shape, serving: Serving, *, int8: bool) -> int:
    """Bytes without which a server cannot work: to load the model, and for one conversation up to its context."""
    return predict_memory(shape, one_conversation(serving), int8=int8, fills=[serving.context]).peak


def _advice(shape: Shape, serving: Serving, limit: int, *, int8: bool) -> str:
    """What fits, nearest to what was asked for first."""
    alone = one_conversation(serving)
    context, unguessed = (
        min(largest_context(shape, each, limit, int8=int8) or 0, serving.context)
        for each in (alone, replace(alone, draft_tokens=0))
    )
    settings = [f"engine.context = {unguessed}"] if 0 < unguessed < serving.context else []
    if unguessed > context:  # guesses only make some answers faster
        settings.append("engine.draft_tokens = 0")
    if settings:
        return f"{' with '.join(settings)} fits; or stop other programs; {_TURN_OFF}"
    small = replace(alone, context=min(serving.context, 2048))
    other = smaller_recipe(shape, small, limit, int8=int8) or smaller_model(shape, small, limit, int8=int8)
    smaller = f"{other.name} in the recipe {other.recipe} fits" if other else "no known model fits"
    return f"{smaller}; or stop other programs; {_TURN_OFF}"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
