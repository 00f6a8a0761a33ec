"""How busy a scheduler is, for health, metrics and those who look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge.throttle import FULL_SPEED, ThrottleState

STALLED_AFTER_S = 30.0
"""Seconds without a finished engine step, while there is work, after which the engine counts as stalled."""


@dataclass(frozen=True)
class SchedulerStats:
    """A snapshot for health, metrics and the MQTT load topic."""

    num_waiting: int
    num_running: int
    """In prefill or decode."""
    slots: int
    max_queue: int
    accepting: bool
    seconds_since_progress: float
    """0 when idle; else since the engine last finished a step. Health follows this."""
    asleep: bool = False
    """The weights are not in memory; the next request brings them back."""
    kv_bytes: int = 0
    """Keys, values and states of the sequences in prefill and decode."""
    num_preempted: int = 0
    """How often a sequence had to give its slot back, since the start."""
    num_drafted: int = 0
    """Guessed tokens that were verified, since the start."""
    num_accepted: int = 0
    """Guessed tokens that were right, since the start."""
    throttle: ThrottleState = FULL_SPEED
    """How much slower the engine works than it could, and why."""

    @property
    def stalled(self) -> bool:
        """Whether there is work and no progress."""
        return self.seconds_since_progress > STALLED_AFTER_S


@dataclass(frozen=True)
class SlotStats:
    """What one occupied slot works on."""

    slot: int
    status: Literal["prefill", "decode"]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    tokens_per_s: float
    """Since the first token; 0 before it."""
    age_s: float
    """Since the request was taken."""


@dataclass(frozen=True)
class Place:
    """Where one sequence is: in the queue or in a slot. Tells nothing of what it says."""

    status: Literal["waiting", "prefill", "decode"]
    position: int | None
    """Sequences ahead in the queue; None once it has a slot."""
    eta_s: float | None
    """Seconds until it may start; None once it has a slot."""
    age_s: float
    """Seconds since it was submitted."""
    num_prompt_tokens: int
    num_output_tokens: int
