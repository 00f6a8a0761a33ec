"""How warm the machine is and how much power it draws, from what Linux tells in ``/sys``.

Three kinds of sensors are known, the best one that there is counts:

* RAPL, energy counters of x86 processors [1]: of the whole platform where it is counted, else of processors and memory;
  most systems let only root read them;
* hwmon sensors that measure a whole board: the rails that feed a Jetson (INA3221 [2]), a board's only power sensor
  elsewhere [3];
* none: then nothing is told, rather than something guessed.

[1] https://docs.kernel.org/power/powercap/powercap.html
[2] https://docs.kernel.org/hwmon/ina3221.html
[3] https://docs.kernel.org/hwmon/sysfs-interface.html
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge.cooling import Throttling, throttling
from edge.sysfs import SYS, read_number, read_text

MIN_PLAUSIBLE_C: Final = -40
MAX_PLAUSIBLE_C: Final = 150
MIN_INTERVAL_S: Final = 0.1
"""Shortest time between two looks at a sensor: reading one over I2C takes a millisecond."""
TOTAL_RAILS: Final = (
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX, TX2
    ("POM_5V_IN",),  # Nano
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO hangs on the last one
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)
"""Labels of the rails that feed a whole module together, on Jetsons [4].

[4] https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/SD/PlatformPowerAndPerformance/JetsonOrinNanoSeriesJetsonOrinNxSeriesAndJetsonAgxOrinSeries.html
"""
FOREIGN_CHIPS: Final = ("drivetemp", "nct6", "nct7", "it8", "f718", "f719", "w83")
"""How the names of hwmon chips begin whose temperatures are none of ours: disks, which reading may keep awake [5], and
chips of main boards, whose unused inputs tell anything up to 127 degrees.

[5] https://docs.kernel.org/hwmon/drivetemp.html
"""
_MICRO = 1e-6


class Thermometer:
    """The machine's hottest sensor.

    Args:
        root: where Linux shows its sensors.
        step_c: least change that is told: the noise of a sensor is no news.
    """

    def __init__(self, root: Path = SYS, *, step_c: float = 0.0) -> None:
        self._root = root
        self._step_c = step_c
        self._told: float | None = None

    def read(self) -> float | None:
        """Degrees Celsius; None on a machine without a sensor."""
        now = max(self._values(), default=None)
        if now is None or self._told is None or abs(now - self._told) >= self._step_c:
            self._told = now
        return self._told

    def _values(self) -> Iterator[float]:
        zones = self._root.glob("class/thermal/thermal_zone*/temp")
        chips = self._root.glob("class/hwmon/hwmon*")
        ours = (chip for chip in chips if not read_text(chip / "name").startswith(FOREIGN_CHIPS))
        for file in [*zones, *(file for chip in ours for file in chip.glob("temp*_input"))]:
            value = read_number(file)
            if value is not None and MIN_PLAUSIBLE_C < value / 1000 < MAX_PLAUSIBLE_C:
                yield float(round(value / 1000))


@dataclass
class _EnergyCounter:
    """A RAPL domain: microjoules that begin anew at the end of their range."""

    file: Path
    range_uj: int
    last_uj: int | None = None

    def read_j(self) -> float | None:
        """Joules since the last call; None where the counter cannot be read any more."""
        now = read_number(self.file)
        if now is None:
            return None
        before, self.last_uj = self.last_uj, now
        if before is None:
            return 0.0
        return (now - before) % max(1, self.range_uj) * _MICRO


class EnergyMeter:
    """Joules that the machine has used since the meter was made, as far as it can tell. Thread-safe.

    Args:
        root: where Linux shows its sensors.
        clock: seconds, monotonic.
    """

    def __init__(self, root: Path = SYS, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counters = _rapl(root)
        self._read_w = None if self._counters else _board_sensor(root)
        self._state = _Reading(at=clock())
        self._look()

    @property
    def is_there(self) -> bool:
        """Whether anything measures."""
        return bool(self._counters) or self._read_w is not None

    def energy_j(self) -> float | None:
        """Joules since the start; None where nothing measures them."""
        with self._lock:
            self._look()
            return self._state.energy_j if self.is_there else None

    def power_w(self) -> float | None:
        """Watts, by the last two looks; None where nothing measures them."""
        with self._lock:
            self._look()
            return self._state.power_w if self.is_there else None

    def _look(self) -> None:
        now = self._clock()
        elapsed = now - self._state.at
        if not self.is_there or (self._state.looked and elapsed < MIN_INTERVAL_S):
            return
        joules = self._counted_j() if self._counters else self._integrated_j(elapsed)
        self._state.add(joules, elapsed, now)

    def _counted_j(self) -> float:
        values = [counter.read_j() for counter in self._counters]
        return sum(value for value in values if value is not None)

    def _integrated_j(self, elapsed: float) -> float:
        """By the trapezoid between two looks."""
        assert self._read_w is not None
        watts = self._read_w()
        if watts is None:
            return 0.0
        before = self._state.sensor_w if self._state.sensor_w is not None else watts
        self._state.sensor_w = watts
        return (before + watts) / 2 * elapsed


@dataclass(frozen=True)
class Sensors:
    """What a machine measures of itself."""

    thermometer: Thermometer = field(default_factory=Thermometer)
    energy: EnergyMeter = field(default_factory=EnergyMeter)
    firmware: Callable[[], Throttling] = throttling
    """What holds the processor's clock down."""


@dataclass
class _Reading:
    """What a meter knows."""

    at: float
    energy_j: float = 0.0
    power_w: float | None = None
    sensor_w: float | None = field(default=None)
    looked: bool = False

    def add(self, joules: float, elapsed: float, now: float) -> None:
        self.energy_j += joules
        self.at = now
        if self.sensor_w is not None:
            self.power_w = self.sensor_w
        elif self.looked and elapsed > 0:
            self.power_w = joules / elapsed
        self.looked = True


def _rapl(root: Path) -> Sequence[_EnergyCounter]:
    """The counter of the platform, or those of processors and of their memory, which they do not include."""
    domains = {file.parent: read_text(file) for file in sorted(root.glob("class/powercap/intel-rapl:*/name"))}
    platform = [_counter(domain) for domain, name in domains.items() if name == "psys"]
    parts = [_counter(domain) for domain, name in domains.items() if name == "dram" or name.startswith("package")]
    # Some machines have a counter of the platform that stands still at 0.
    counted = [counter for counter in platform if counter is not None and read_number(counter.file)]
    return counted or [counter for counter in parts if counter is not None]


def _counter(domain: Path) -> _EnergyCounter | None:
    """None where it cannot be read."""
    most = read_number(domain / "max_energy_range_uj")
    readable = most and read_number(domain / "energy_uj") is not None
    return _EnergyCounter(domain / "energy_uj", most + 1) if most and readable else None


def _board_sensor(root: Path) -> Callable[[], float | None] | None:
    """What reads the power of a whole board, in watts."""
    chips = sorted(root.glob("class/hwmon/hwmon*"))
    rails = {read_text(label): label for chip in chips for label in sorted(chip.glob("in[123]_label"))}
    for names in TOTAL_RAILS:
        if set(names) <= rails.keys():
            return _sum([_product(*_channel(rails[name])) for name in names])
    sensors = [file for chip in chips for file in sorted(chip.glob("power*_input")) if read_number(file) is not None]
    return _scaled(sensors[0]) if len(sensors) == 1 else None


def _channel(label: Path) -> tuple[Path, Path]:
    """Where a channel of an INA3221 tells millivolts and milliamperes."""
    number = label.name.removeprefix("in").removesuffix("_label")
    return label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")


def _sum(parts: Sequence[Callable[[], float | None]]) -> Callable[[], float | None]:
    """None while any part tells nothing: half a board is no board."""

    def read() -> float | None:
        values = [part() for part in parts]
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    return read


def _product(millivolts: Path, milliamperes: Path) -> Callable[[], float | None]:
    def read() -> float | None:
        volts, amperes = read_number(millivolts), read_number(milliamperes)
        return None if volts is None or amperes is None else volts * amperes * _MICRO

    return read


def _scaled(microwatts: Path) -> Callable[[], float | None]:
    def read() -> float | None:
        value = read_number(microwatts)
        return None if value is None else value * _MICRO

    return read
