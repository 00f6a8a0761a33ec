"""Prometheus metrics of the service (https://prometheus.io/docs/practices/naming/)."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edge.cooling import LIMITS, Throttling
from edge.errors import QwedgeError
from edge.power import Sensors
from edge.scheduler import SchedulerStats
from edge.sequence import FinishReason, Timings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RECENT_S = 60.0
"""What :meth:`Metrics.recent` looks back on."""
_MAX_RECENT = 256
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


@dataclass(frozen=True)
class RecentFigures:
    """What recent answers were like; None where there were none."""

    ttft_s: float | None
    """Median time to first token, the queue included."""
    tokens_per_s: float | None
    """Of one answer, by its median time per token."""
    cache_hit_ratio: float | None
    """The part of the prompts' tokens that the prefix cache knew, 0 to 1."""
    joules_per_token: float | None
    """For each output token, the prompts' reading included; None where nothing measures energy."""


@dataclass(frozen=True)
class _Recent:
    """An answer and when it was complete."""

    at: float
    timings: Timings


class Metrics:
    """Counters of one service in a registry of their own; safe to update from any thread.

    Args:
        sensors: of the machine; None = nothing is measured.
    """

    def __init__(self, sensors: Sensors | None = None) -> None:
        self.sensors = sensors
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "qwedge_requests", "Requests that ended, by outcome (stop, length or error code)", ["outcome"],
            registry=self._registry,
        )  # fmt: skip
        self._prompt_tokens = Counter("qwedge_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self._cached_tokens = Counter(
            "qwedge_cached_tokens", "Tokens of prompts that the prefix cache knew", registry=self._registry
        )
        self._output_tokens = Counter("qwedge_output_tokens", "Tokens generated", registry=self._registry)
        self._ttft = Histogram(
            "qwedge_ttft_seconds", "Time to first token, queue included", buckets=_TTFT_BUCKETS, registry=self._registry
        )
        self._tpot = Histogram(
            "qwedge_tpot_seconds", "Mean time per output token", buckets=_TPOT_BUCKETS, registry=self._registry
        )
        self._queue = Histogram(
            "qwedge_queue_seconds", "Time in the queue", buckets=_TTFT_BUCKETS, registry=self._registry
        )
        self._waiting = Gauge("qwedge_waiting_requests", "Requests in the queue", registry=self._registry)
        self._running = Gauge("qwedge_running_requests", "Requests in prefill or decode", registry=self._registry)
        self._slots = Gauge("qwedge_slots", "Requests that can run at once", registry=self._registry)
        self._kv_bytes = Gauge("qwedge_kv_cache_bytes", "Keys and values of running requests", registry=self._registry)
        self._asleep = Gauge("qwedge_asleep", "1 while the weights are not in memory", registry=self._registry)
        self._guesses = Counter(
            "qwedge_guessed_tokens",
            "Tokens guessed ahead and verified, by outcome",
            ["outcome"],
            registry=self._registry,
        )
        self._temperature = Gauge(
            "qwedge_temperature_celsius", "Of the machine's hottest sensor; NaN without one", registry=self._registry
        )
        self._power = Gauge(
            "qwedge_power_watts", "What the machine draws; NaN where nothing measures it", registry=self._registry
        )
        self._energy = Gauge(
            "qwedge_energy_joules", "What the machine has used since the start; NaN where nothing measures it",
            registry=self._registry,
        )  # fmt: skip
        self._throttle_level = Gauge(
            "qwedge_throttle_level", "How far the engine is slowed down: 0 = not at all, 12 = to a quarter",
            registry=self._registry,
        )  # fmt: skip
        self._speed = Gauge(
            "qwedge_speed_ratio", "The part of its full speed that the engine works at", registry=self._registry
        )
        self._firmware = Gauge(
            "qwedge_firmware_throttling", "1 while this holds the processor's clock down", ["limit"],
            registry=self._registry,
        )  # fmt: skip
        self._request_energy = Counter(
            "qwedge_request_energy_joules", "What the machine has used while it worked for requests",
            registry=self._registry,
        )  # fmt: skip
        self._preemptions = Counter(
            "qwedge_preemptions", "Requests that gave their slot back for a while", registry=self._registry
        )
        self._rule_messages = Counter(
            "qwedge_rule_messages", "Messages that MQTT rules took, by outcome", ["rule", "outcome"],
            registry=self._registry,
        )  # fmt: skip
        self._num_output_tokens = 0
        self._recent: deque[_Recent] = deque(maxlen=_MAX_RECENT)
        self._rendering = threading.Lock()
        self._rendered: SchedulerStats | None = None  # guarded by _rendering

    def finished(self, reason: FinishReason, timings: Timings) -> None:
        """Count a complete answer."""
        self._recent.append(_Recent(time.monotonic(), timings))
        self._requests.labels(reason).inc()
        self._count_work(timings)
        self._queue.observe(timings.queue_s)
        if timings.num_output_tokens:
            self._ttft.observe(timings.ttft_s)
        if timings.tpot_s:
            self._tpot.observe(timings.tpot_s)

    def failed(self, error: QwedgeError, timings: Timings) -> None:
        """Count a request that ended without a complete answer, and the work it cost."""
        self._requests.labels(error.code).inc()
        # A request that never left the queue prefilled nothing.
        if timings.num_output_tokens:
            self._count_work(timings)

    def refused(self, error: QwedgeError) -> None:
        """Count a request that was not accepted."""
        self._requests.labels(error.code).inc()

    def rule(self, name: str, outcome: str) -> None:
        """Count a message of a rule: answered, failed, unchanged, superseded or dropped."""
        self._rule_messages.labels(name, outcome).inc()

    def recent(self, within_s: float = RECENT_S) -> RecentFigures:
        """What the answers of the last seconds were like."""
        now = time.monotonic()
        timings = [each.timings for each in list(self._recent) if now - each.at <= within_s]
        ttft = [each.ttft_s for each in timings if each.num_output_tokens]
        tpot = [each.tpot_s for each in timings if each.tpot_s]
        num_prompt = sum(each.num_prompt_tokens for each in timings)
        return RecentFigures(
            ttft_s=median(ttft) if ttft else None,
            tokens_per_s=1 / median(tpot) if tpot else None,
            cache_hit_ratio=sum(each.num_cached_tokens for each in timings) / num_prompt if num_prompt else None,
            joules_per_token=_joules_per_token(timings),
        )

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all requests that have ended."""
        return self._num_output_tokens

    def temperature_c(self) -> float | None:
        """Of the machine's hottest sensor; None without one."""
        return None if self.sensors is None else self.sensors.thermometer.read()

    def power_w(self) -> float | None:
        """What the machine draws; None where nothing measures it."""
        return None if self.sensors is None else self.sensors.energy.power_w()

    def energy_j(self) -> float | None:
        """What the machine has used since the start; None where nothing measures it."""
        return None if self.sensors is None else self.sensors.energy.energy_j()

    def firmware(self) -> Throttling:
        """What holds the processor's clock down; nothing where nobody tells."""
        return Throttling() if self.sensors is None else self.sensors.firmware()

    def render(self, stats: SchedulerStats) -> bytes:
        """The text exposition, with the gauges set from ``stats``."""
        self._waiting.set(stats.num_waiting)
        self._running.set(stats.num_running)
        self._slots.set(stats.slots)
        self._kv_bytes.set(stats.kv_bytes)
        self._asleep.set(stats.asleep)
        self._temperature.set(_or_nan(self.temperature_c()))
        self._power.set(_or_nan(self.power_w()))
        self._energy.set(_or_nan(self.energy_j()))
        self._throttle_level.set(stats.throttle.level)
        self._speed.set(stats.throttle.speed)
        limits = self.firmware().now
        for limit in LIMITS:
            self._firmware.labels(limit).set(limit in limits)
        with self._rendering:
            self._count_since(self._rendered, stats)
            self._rendered = stats
        return generate_latest(self._registry)

    def _count_since(self, before: SchedulerStats | None, now: SchedulerStats) -> None:
        """Let the counters follow what the scheduler has counted since it was asked last."""
        accepted = now.num_accepted - (before.num_accepted if before else 0)
        drafted = now.num_drafted - (before.num_drafted if before else 0)
        self._guesses.labels("right").inc(max(0, accepted))
        self._guesses.labels("wrong").inc(max(0, drafted - accepted))
        self._preemptions.inc(max(0, now.num_preempted - (before.num_preempted if before else 0)))

    def _count_work(self, timings: Timings) -> None:
        self._prompt_tokens.inc(timings.num_prompt_tokens)
        self._cached_tokens.inc(timings.num_cached_tokens)
        self._output_tokens.inc(timings.num_output_tokens)
        self._num_output_tokens += timings.num_output_tokens
        self._request_energy.inc(timings.energy_j or 0.0)


def _joules_per_token(timings: Sequence[Timings]) -> float | None:
    measured = [(each.energy_j, each.num_output_tokens) for each in timings if each.energy_j is not None]
    num_tokens = sum(count for _, count in measured)
    return sum(joules for joules, _ in measured) / num_tokens if num_tokens else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
