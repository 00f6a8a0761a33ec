"""Safe mode: a service that ended by itself again and again starts once more without what may have ended it."""

from __future__ import annotations

from typing import Final

from edge.config import Settings

SAFE_CONTEXT: Final = 1024
"""Tokens of a conversation: enough for a question and a short answer."""


def safe_settings(settings: Settings, context_length: int) -> Settings:
    """The settings without adapters, rules and past prompts, with one slot, a short context and nothing guessed.

    Args:
        settings: what is configured.
        context_length: the bundle's.
    """
    wanted = settings.engine.context or SAFE_CONTEXT
    engine = {
        "context": min(wanted, SAFE_CONTEXT, context_length),
        "slots": 1,
        "kv_cache_mb": None,
        "draft_tokens": 0,
        "prefix_cache_mb": 0,
        "prefix_store": None,
    }
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"adapters": None}),
            "engine": settings.engine.model_copy(update=engine),
            "mqtt": settings.mqtt.model_copy(update={"rule": ()}),
        }
    )


def explain(deaths: int, retry_after_s: float) -> str:
    """Why a device does less than it should."""
    return (
        f"safe mode: the {deaths} starts before this one ended by themselves; one request at a time, a short context,"
        f" no adapters and no rules until a restart, which it tries by itself after {retry_after_s / 3600:g} h"
    )
