"""Slower before the machine gets too hot or draws too much: the engine pauses between its steps.

Pauses are what lowers power in proportion. A token costs the same processor time with them as without, and its bits are
the same; running fewer sequences at once would cost more for each token, as they share the reading of the weights, and
threads of onnxruntime cannot be taken back (docs/operations.md has the figures). Prompts are read in smaller chunks
meanwhile, so that a running answer waits no longer for them than at full speed.

There are :data:`LEVELS` levels; each takes a sixteenth of the speed, the last one leaves a quarter. A level is taken as
soon as it is wanted, and left one at a time, long after the last one was taken: that is what keeps it from swinging.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from edge.power import Sensors

log = logging.getLogger(__name__)

Reason = Literal["heat", "power"]

LEVELS: Final = 12
"""The highest level."""
MAX_PAUSE_S: Final = 5.0
"""Longest pause: requests that are cancelled end with the next step, and health must not take it for a stall."""
LOOK_EVERY_S: Final = 1.0
FASTER_AFTER_S: Final = 60.0
"""How long after a rise of the level the first fall may come."""
FASTER_EVERY_S: Final = 5.0
POWER_OVER_S: Final = 5.0
"""What power is averaged over; as long at one level before it counts."""
MIN_CHUNK: Final = 16
"""Prompt tokens: shorter chunks cost more for each of them."""
_STEP: Final = 1 / 16


@dataclass(frozen=True)
class Limits:
    """What must not be reached; None = whatever comes."""

    from_c: float | None = None
    """Degrees above which the engine is slowed down."""
    until_c: float | None = None
    """Degrees at which it is slowest; above ``from_c``."""
    max_w: float | None = None
    """Watts that the machine may draw, on average over seconds."""


@dataclass(frozen=True)
class ThrottleState:
    """How much slower the engine works than it could."""

    level: int = 0
    """0 = at full speed, to :data:`LEVELS`."""
    reason: Reason | None = None
    """Why; None at full speed."""

    @property
    def speed(self) -> float:
        """The part of the time that the engine may work."""
        return 1 - self.level * _STEP


FULL_SPEED: Final = ThrottleState()


class Governor:
    """Which level the measured values call for.

    Args:
        limits: what must not be reached.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._watts: deque[tuple[float, float]] = deque()  # when, and how much; all at the present level
        self._risen_at = self._fallen_at = -math.inf
        self.state = FULL_SPEED
        """The present level."""

    def look(self, now: float, temperature_c: float | None, power_w: float | None) -> ThrottleState:
        """Take new values into account.

        Args:
            now: seconds, monotonic.
            temperature_c: of the hottest sensor; None where nothing measures it.
            power_w: mean since the last look; None where nothing measures it.
        """
        level = self.state.level
        heat, power = self._for_heat(temperature_c), self._for_power(now, power_w)
        if max(heat, power) > level:
            self._risen_at = now
            self._go(max(heat, power), "heat" if heat >= power else "power")
        elif level and self._may_fall(now) and max(self._for_heat(temperature_c, margin=1), power) < level:
            self._fallen_at = now
            self._go(level - 1, self.state.reason)
        return self.state

    def _may_fall(self, now: float) -> bool:
        return now - self._risen_at >= FASTER_AFTER_S and now - self._fallen_at >= FASTER_EVERY_S

    def _go(self, level: int, reason: Reason | None) -> None:
        self._watts.clear()
        self.state = ThrottleState(level, reason if level else None)

    def _for_heat(self, temperature_c: float | None, margin: int = 0) -> int:
        """A level for every part of the way between the limits; with a ``margin``, as if it were that much warmer."""
        low, high = self._limits.from_c, self._limits.until_c
        if temperature_c is None or low is None or high is None:
            return 0
        way = (temperature_c - low) / (high - low) * LEVELS
        return max(0, min(LEVELS, math.ceil(way) + margin))

    def _for_power(self, now: float, power_w: float | None) -> int:
        """The level at which the limit would be kept if all power went into the engine's work: never one too low."""
        level, limit = self.state.level, self._limits.max_w
        if power_w is None or limit is None:
            return 0
        self._watts.append((now, power_w))
        while now - self._watts[0][0] > 2 * POWER_OVER_S:  # nobody looked for a while
            self._watts.popleft()
        if now - self._watts[0][0] < POWER_OVER_S:
            return level
        mean = sum(watts for _, watts in self._watts) / len(self._watts)
        self._watts.popleft()
        if mean <= limit:
            faster = self.state.speed + _STEP
            return level - 1 if level and mean * faster / self.state.speed <= limit else level
        wanted = (1 - self.state.speed * limit / mean) / _STEP
        return min(LEVELS, max(level + 1, math.ceil(wanted)))


class Throttle:
    """Slows an engine down as long as its machine needs that.

    Sensors are looked at once a second by a thread of its own, while the engine works or is slowed down; without limits
    there is neither thread nor look.

    Args:
        limits: what must not be reached.
        sensors: of the machine; None = those that there are, where there are limits.
        clock: seconds, monotonic.
        wait: waits for so many seconds; None = until then or :meth:`stop`.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        sensors: Sensors | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._governor = Governor(self._limits)
        self._sensors = sensors
        self._clock = clock
        self._wait = wait or self._wait_for_stop
        self._changed = threading.Condition()
        self._working = False  # guarded by _changed
        self._has_worked = False  # guarded by _changed: since the last look, be it for a moment
        self._stopped = False  # guarded by _changed
        self._energy: tuple[float, float] | None = None  # when, and how many joules: at the last look
        self._thread: threading.Thread | None = None
        self.state = FULL_SPEED
        """The present level; from any thread."""

    def start(self) -> None:
        """Look at the sensors from now on, if there are limits."""
        self._stopped = False
        if self._limits == Limits():
            return
        self._sensors = self._sensors or Sensors()
        self._thread = threading.Thread(target=self._run, name="throttle", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and the pause that the engine is in."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def begin(self) -> None:
        """The engine begins to work."""
        with self._changed:
            self._working = self._has_worked = True
            self._changed.notify_all()

    def end(self) -> None:
        """The engine has nothing left to do."""
        with self._changed:
            self._working = False

    def rest(self, work_s: float) -> None:
        """Pause as is due after a step that took so long; on the engine's thread."""
        if self.state.level:
            self._wait(min(MAX_PAUSE_S, work_s * (1 / self.state.speed - 1)))

    def chunk(self, most: int) -> int:
        """How many prompt tokens to read in one step where ``most`` are allowed."""
        return max(min(most, MIN_CHUNK), int(most * self.state.speed)) if self.state.level else most

    def look(self) -> None:
        """Read the sensors, and set the level by them."""
        assert self._sensors is not None
        now, before = self._clock(), self.state
        temperature_c = None if self._limits.from_c is None else self._sensors.thermometer.read()
        power_w = None if self._limits.max_w is None else self._power_w(self._sensors, now)
        self.state = self._governor.look(now, temperature_c, power_w)
        self._tell(before, temperature_c, power_w)

    def _power_w(self, sensors: Sensors, now: float) -> float | None:
        """The mean since the last look; None at the first one, and where nothing measures it."""
        before, joules = self._energy, sensors.energy.energy_j()
        if joules is None:
            return None
        self._energy = now, joules
        return None if before is None or now <= before[0] else (joules - before[1]) / (now - before[0])

    def _run(self) -> None:
        self._attempt(self._check)
        while self._await_look():
            self._attempt(self.look)
            self._wait_for_stop(LOOK_EVERY_S)

    def _await_look(self) -> bool:
        """Wait until the engine works, unless it is slowed down; false when this stops."""
        with self._changed:
            if not (self.state.level or self._working or self._has_worked):
                self._energy = None  # what was drawn while nobody asked is not what work draws
                self._changed.wait_for(lambda: self._has_worked or self._stopped)
            self._has_worked = False
            return not self._stopped

    def _wait_for_stop(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, timeout_s)

    @staticmethod
    def _attempt(reading: Callable[[], None]) -> None:
        try:
            reading()
        except OSError as error:  # a device that is just being unplugged
            log.warning("the sensors cannot be read: %s", error)

    def _check(self) -> None:
        """Say so where a limit has no effect."""
        sensors = self._sensors
        assert sensors is not None
        if self._limits.from_c is not None and sensors.thermometer.read() is None:
            log.warning("nothing measures the temperature here: power.throttle_from_c has no effect")
        if self._limits.max_w is not None and not sensors.energy.is_there:
            log.warning("nothing measures the power here: power.max_w has no effect")

    def _tell(self, before: ThrottleState, temperature_c: float | None, power_w: float | None) -> None:
        """The beginning and the end, and when it cannot get slower: what is between would fill the log."""
        now = self.state
        if now.level == before.level:
            return
        celsius = [] if temperature_c is None else [f"{temperature_c:g} C"]
        values = " and ".join([*celsius, *([] if power_w is None else [f"{power_w:.1f} W"])])
        if not now.level:
            log.info("at full speed again, at %s", values)
        elif not before.level or now.level == LEVELS:
            log.warning("slowed down to %.0f%% for %s, at %s", 100 * now.speed, now.reason, values)
        else:
            log.debug("at %.0f%% of the speed, at %s", 100 * now.speed, values)
