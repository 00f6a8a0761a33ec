"""What holds the processor's clock down, as firmware and kernel tell it in ``/sys``.

* Raspberry Pi: the firmware's flags [1], and the alarm of its voltage sensor [2];
* cooling devices of the kernel that slow the processor down [3];
* a top of the clock below what the processor could [4];
* x86: how often the processor has throttled itself since the boot [5];
* Jetsons: how often the voltage was too low, or a rail drew too much, since the boot [6].

[1] https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
[2] https://docs.kernel.org/hwmon/raspberrypi-hwmon.html
[3] https://docs.kernel.org/driver-api/thermal/sysfs-api.html
[4] https://docs.kernel.org/admin-guide/pm/cpufreq.html
[5] https://www.kernel.org/doc/Documentation/ABI/testing/sysfs-devices-system-cpu (thermal_throttle)
[6] https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/SD/PlatformPowerAndPerformance/JetsonOrinNanoSeriesJetsonOrinNxSeriesAndJetsonAgxOrinSeries.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from edge.sysfs import SYS, read_number, read_text

Limit = Literal["under_voltage", "clock_capped", "throttled", "hot", "over_current"]

LIMITS: Final[tuple[Limit, ...]] = ("under_voltage", "clock_capped", "throttled", "hot", "over_current")
"""All of them, in the order in which they are told."""
_PI_FLAGS: Final[tuple[Limit, ...]] = ("under_voltage", "clock_capped", "throttled", "hot")
"""By bit; 16 bits further up: since the boot."""
_CPU_COOLERS: Final = ("cpufreq", "thermal-cpufreq", "Processor", "cpu-throttle-alert")
"""How the types of cooling devices begin that slow the processor down; others are fans, or the GPU's."""

_UNDER_VOLTAGE_EVENTS: Final = "oc1_event_cnt"
"""On Orins; the others count averages and peaks of the current."""


@dataclass(frozen=True)
class Throttling:
    """What holds the clock down."""

    now: tuple[Limit, ...] = ()
    since_boot: tuple[Limit, ...] = ()
    """What has done so since the boot, as far as somebody counts it."""


def throttling(root: Path = SYS) -> Throttling:
    """What holds the clock down now, and has done so since the boot; nothing where nobody tells.

    Args:
        root: where Linux shows its devices.
    """
    flags = _pi_flags(root)
    now = {*_flagged(flags), *_alarms(root), *_cooled(root), *_capped(root)}
    past = {*_flagged(flags >> 16), *_counted(root)}
    return Throttling(_in_order(now), _in_order(past))


def _in_order(found: set[Limit]) -> tuple[Limit, ...]:
    return tuple(limit for limit in LIMITS if limit in found)


def _pi_flags(root: Path) -> int:
    """A hexadecimal number; 0 elsewhere."""
    for file in root.glob("devices/platform/soc*/soc*firmware/get_throttled"):
        with suppress(ValueError):
            return int(read_text(file), 16)
    return 0


def _flagged(flags: int) -> Iterator[Limit]:
    return (limit for bit, limit in enumerate(_PI_FLAGS) if flags >> bit & 1)


def _alarms(root: Path) -> Iterator[Limit]:
    for chip in root.glob("class/hwmon/hwmon*"):
        if read_text(chip / "name") == "rpi_volt" and read_number(chip / "in0_lcrit_alarm"):
            yield "under_voltage"


def _cooled(root: Path) -> Iterator[Limit]:
    for device in root.glob("class/thermal/cooling_device*"):
        if read_text(device / "type").startswith(_CPU_COOLERS) and (read_number(device / "cur_state") or 0) > 0:
            yield "hot"


def _capped(root: Path) -> Iterator[Limit]:
    for policy in root.glob("devices/system/cpu/cpufreq/policy*"):
        top, could = read_number(policy / "scaling_max_freq"), read_number(policy / "cpuinfo_max_freq")
        if top is not None and could is not None and top < could:
            yield "clock_capped"


def _counted(root: Path) -> Iterator[Limit]:
    if any(map(read_number, root.glob("devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"))):
        yield "hot"
    for file in root.glob("class/hwmon/hwmon*/oc*_event_cnt"):
        if read_number(file):
            yield "under_voltage" if file.name == _UNDER_VOLTAGE_EVENTS else "over_current"
