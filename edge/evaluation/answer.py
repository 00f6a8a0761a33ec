"""What a target said, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_CHARS = 256 << 10
"""Of an answer's text; what comes after is not looked at."""


@dataclass(frozen=True)
class Answer:
    """One answer. A figure that the target does not tell is None."""

    text: str
    latency_ms: float
    """From the question to the whole answer, waiting included."""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_ms: float | None = None
    tokens_per_second: float | None = None
    """While decoding."""
    energy_j: float | None = None

    @classmethod
    def of(cls, body: Mapping[str, Any], latency_ms: float) -> Answer:
        """From OpenAI's answer to a chat, with qwedge's ``timings`` where they are.

        Raises:
            LookupError, TypeError: it is none.
        """
        choice = body["choices"][0]
        usage, timings = body.get("usage") or {}, body.get("timings") or {}
        return cls(
            text=str(choice["message"]["content"] or "")[:MAX_CHARS],
            latency_ms=round(latency_ms, 3),
            finish_reason=choice.get("finish_reason"),
            prompt_tokens=_number(usage, "prompt_tokens"),
            completion_tokens=_number(usage, "completion_tokens"),
            ttft_ms=_number(timings, "ttft_ms"),
            tokens_per_second=_number(timings, "decode_tokens_per_second"),
            energy_j=_number(timings, "energy_j"),
        )


def _number(figures: Mapping[str, Any], name: str) -> Any:
    value = figures.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
