"""What holds the clock of real boards down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from edge.cooling import Throttling, throttling
from edge.metrics import Metrics
from edge.power import EnergyMeter, Sensors, Thermometer
from edge.scheduler import SchedulerStats
from tests.edge import sysfs_trees as boards


@pytest.mark.parametrize(
    ("tree", "now", "since_boot"),
    [
        (boards.RASPBERRY_PI_4, ("under_voltage", "throttled"), ("under_voltage", "throttled")),
        (boards.RASPBERRY_PI_5, (), ()),
        (boards.JETSON_ORIN_NANO, ("clock_capped",), ("over_current",)),
        (boards.JETSON_AGX_ORIN, (), ()),
        (boards.RK3588, ("hot",), ()),
        (boards.X86_N100, (), ("hot",)),
        ({}, (), ()),
    ],
)
def test_what_boards_tell(
    tree: Mapping[str, str], now: tuple[str, ...], since_boot: tuple[str, ...], tmp_path: Path
) -> None:
    found = throttling(boards.plant(tmp_path, tree))
    assert (found.now, found.since_boot) == (now, since_boot)


@pytest.mark.parametrize(
    ("flags", "now", "since_boot"),
    [
        ("0", (), ()),
        ("0x2", ("clock_capped",), ()),
        ("e0008", ("hot",), ("clock_capped", "throttled", "hot")),
        ("nonsense", (), ()),
    ],
)
def test_flags_of_the_pis_firmware(
    flags: str, now: tuple[str, ...], since_boot: tuple[str, ...], tmp_path: Path
) -> None:
    boards.plant(tmp_path, {"devices/platform/soc/soc:firmware/get_throttled": flags})
    found = throttling(tmp_path)
    assert (found.now, found.since_boot) == (now, since_boot)


def test_the_voltage_sensor_alone_is_enough(tmp_path: Path) -> None:
    tree = {name: text for name, text in boards.RASPBERRY_PI_4.items() if "hwmon1" in name}
    assert throttling(boards.plant(tmp_path, tree)) == Throttling(now=("under_voltage",))


def test_jetsons_tell_too_low_a_voltage_from_too_high_a_current(tmp_path: Path) -> None:
    boards.plant(tmp_path, boards.JETSON_ORIN_NANO | {"class/hwmon/hwmon3/oc1_event_cnt": "1"})
    assert throttling(tmp_path).since_boot == ("under_voltage", "over_current")


def test_the_metrics_show_it(tmp_path: Path) -> None:
    boards.plant(tmp_path, boards.RK3588)
    sensors = Sensors(Thermometer(tmp_path), EnergyMeter(tmp_path), firmware=lambda: throttling(tmp_path))
    stats = SchedulerStats(0, 0, slots=1, max_queue=1, accepting=True, seconds_since_progress=0.0)
    text = Metrics(sensors).render(stats).decode()
    assert 'qwedge_firmware_throttling{limit="hot"} 1.0\n' in text
    assert 'qwedge_firmware_throttling{limit="under_voltage"} 0.0\n' in text
