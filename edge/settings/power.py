"""``[power]``: when to work slower for the sake of heat or a battery."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from edge.settings.section import Section

MIN_SPAN_C = 3
"""Least distance between the temperatures: sensors tell whole degrees, and are wrong by one."""


class PowerSettings(Section):
    """Heat and power: the engine pauses between its steps as they rise, down to a quarter of its speed."""

    throttle_from_c: float | None = Field(
        None,
        ge=20,
        le=120,
        description="Degrees Celsius of the hottest sensor above which the engine gets slower; see"
        " docs/operations.md. Without it, never for heat.",
    )
    throttle_until_c: float | None = Field(
        None,
        ge=20,
        le=120,
        description="Degrees at which it is slowest. Choose less than what the firmware throttles at.",
    )
    max_w: float | None = Field(
        None,
        gt=0,
        le=10_000,
        allow_inf_nan=False,
        description="Watts that the machine may draw, on average over five seconds, where something measures them."
        " Without it, as many as it takes.",
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        low, high = self.throttle_from_c, self.throttle_until_c
        if (low is None) != (high is None):
            raise ValueError("throttle_from_c and throttle_until_c need each other")
        if low is not None and high is not None and high - low < MIN_SPAN_C:
            raise ValueError(f"throttle_until_c must be at least {MIN_SPAN_C} above throttle_from_c")
        return self
