"""Temperature, power and energy, from trees like Linux's ``/sys``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from edge.metrics import Metrics
from edge.power import EnergyMeter, Sensors, Thermometer
from edge.scheduler import SchedulerStats
from tests.edge import sysfs_trees as boards


class Clock:
    """Time that goes on when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def write(root: Path, **files: str) -> None:
    """Files by their path, with ``__`` for ``/``."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="ascii")


def rapl(root: Path, domain: str, name: str, energy_uj: int, most_uj: int = 1_000_000_000) -> None:
    folder = root / "class" / "powercap" / domain
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in {"name": name, "energy_uj": energy_uj, "max_energy_range_uj": most_uj}.items():
        (folder / file).write_text(f"{value}\n", encoding="ascii")


def test_the_hottest_plausible_sensor_is_told_in_steps(tmp_path: Path) -> None:
    meter = Thermometer(tmp_path, step_c=2.0)
    assert meter.read() is None
    zone = "class__thermal__thermal_zone{}__temp"
    values = {0: "45100", 1: "-274000", 2: "nonsense", 3: "61400"}
    write(tmp_path, **{zone.format(number): value for number, value in values.items()})
    (tmp_path / "class/thermal/thermal_zone4/temp").mkdir(parents=True)  # reading it fails, as of a sensor that is off
    assert meter.read() == 61.0
    for value, told in (("62400", 61.0), ("63100", 63.0), ("62000", 63.0), ("45000", 45.0)):
        write(tmp_path, **{zone.format(0): "40000", zone.format(3): value})
        assert meter.read() == told


def test_chips_count_as_sensors_too(tmp_path: Path) -> None:
    write(tmp_path, class__hwmon__hwmon0__temp1_input="71000", class__thermal__thermal_zone0__temp="50000")
    assert Thermometer(tmp_path).read() == 71.0


def test_a_machine_without_sensors_tells_nothing(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path, Clock())
    assert (meter.is_there, meter.energy_j(), meter.power_w()) == (False, None, None)


def test_counters_of_processors_are_added_up_without_their_parts(tmp_path: Path) -> None:
    clock = Clock()
    for domain, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core")):
        rapl(tmp_path, domain, name, 5_000_000)
    meter = EnergyMeter(tmp_path, clock)
    assert meter.energy_j() == 0.0
    clock.now += 2
    rapl(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    rapl(tmp_path, "intel-rapl:1", "package-1", 6_000_000)
    rapl(tmp_path, "intel-rapl:0:0", "core", 8_000_000)
    assert meter.energy_j() == pytest.approx(5.0)
    assert meter.power_w() == pytest.approx(2.5)


def test_a_counter_that_begins_anew_loses_nothing(tmp_path: Path) -> None:
    clock = Clock()
    rapl(tmp_path, "intel-rapl:0", "package-0", 9_000_000, most_uj=9_999_999)
    meter = EnergyMeter(tmp_path, clock)
    clock.now += 1
    rapl(tmp_path, "intel-rapl:0", "package-0", 2_000_000, most_uj=9_999_999)
    assert meter.energy_j() == pytest.approx(3.0)


def test_the_rail_of_a_whole_board_is_integrated(tmp_path: Path) -> None:
    clock = Clock()
    chip = "class__hwmon__hwmon3__"
    write(
        tmp_path,
        **{
            f"{chip}in1_label": "VDD_IN", f"{chip}in1_input": "5000", f"{chip}curr1_input": "1000",
            f"{chip}in2_label": "VDD_CPU_GPU_CV", f"{chip}in2_input": "5000", f"{chip}curr2_input": "400",
        },
    )  # fmt: skip
    meter = EnergyMeter(tmp_path, clock)
    assert meter.power_w() == pytest.approx(5.0)
    clock.now += 2
    write(tmp_path, **{f"{chip}curr1_input": "3000"})
    assert meter.energy_j() == pytest.approx((5 + 15) / 2 * 2)
    assert meter.power_w() == pytest.approx(15.0)


def test_looks_that_follow_too_soon_are_spared(tmp_path: Path) -> None:
    clock = Clock()
    write(tmp_path, class__hwmon__hwmon0__power1_input="7000000")
    meter = EnergyMeter(tmp_path, clock)
    clock.now += 0.05
    write(tmp_path, class__hwmon__hwmon0__power1_input="9000000")
    assert meter.power_w() == pytest.approx(7.0)
    clock.now += 0.06
    assert meter.power_w() == pytest.approx(9.0)


def test_one_of_several_unknown_sensors_is_not_taken_for_the_board(tmp_path: Path) -> None:
    write(tmp_path, class__hwmon__hwmon0__power1_input="7000000", class__hwmon__hwmon1__power1_input="1000000")
    assert not EnergyMeter(tmp_path, Clock()).is_there


def test_a_sensor_that_fails_adds_nothing(tmp_path: Path) -> None:
    clock = Clock()
    write(tmp_path, class__hwmon__hwmon0__power1_input="7000000")
    meter = EnergyMeter(tmp_path, clock)
    clock.now += 1
    (tmp_path / "class/hwmon/hwmon0/power1_input").unlink()
    assert meter.energy_j() == 0.0


@pytest.mark.parametrize(
    ("tree", "celsius", "watts"),
    [
        (boards.RASPBERRY_PI_4, 82.0, None),
        (boards.RASPBERRY_PI_5, 57.0, None),
        (boards.JETSON_ORIN_NANO, 52.0, 4.984 * 1.856),
        (boards.JETSON_AGX_ORIN, 77.0, 3.14 + 14.3 + 4.968),
        (boards.JETSON_AGX_XAVIER, None, 6 * 1.9),
        (boards.RK3588, 86.0, None),
    ],
)
def test_boards_tell_what_their_sensors_are_for(
    tree: Mapping[str, str], celsius: float | None, watts: float | None, tmp_path: Path
) -> None:
    boards.plant(tmp_path, tree)
    assert Thermometer(tmp_path).read() == celsius
    power = EnergyMeter(tmp_path, Clock()).power_w()
    assert power == (None if watts is None else pytest.approx(watts))


def test_half_a_board_is_no_board(tmp_path: Path) -> None:
    boards.plant(tmp_path, boards.JETSON_AGX_ORIN)
    clock = Clock()
    meter = EnergyMeter(tmp_path, clock)
    clock.now += 1
    (tmp_path / "class/hwmon/hwmon3/curr2_input").unlink()
    assert meter.energy_j() == 0.0


@pytest.mark.parametrize(
    ("before", "changes", "joules"),
    [
        ({}, {"intel-rapl:0": 9_000_000, "intel-rapl:0:0": 6_000_000, "intel-rapl:0:1": 1_500_000}, 2.5),
        ({"intel-rapl:1": 3_000_000}, {"intel-rapl:0": 9_000_000, "intel-rapl:1": 8_000_000}, 5.0),
    ],
    ids=["processor and memory", "the platform"],
)
def test_a_pc_counts_the_platform_or_else_processor_and_memory(
    before: dict[str, int], changes: dict[str, int], joules: float, tmp_path: Path
) -> None:
    def count(domains: dict[str, int]) -> None:
        boards.plant(tmp_path, {f"class/powercap/{name}/energy_uj": str(value) for name, value in domains.items()})

    boards.plant(tmp_path, boards.X86_N100)
    count(before)
    clock = Clock()
    meter = EnergyMeter(tmp_path, clock)
    clock.now += 1
    count(changes)
    assert meter.energy_j() == pytest.approx(joules)


def test_disks_and_inputs_that_nothing_hangs_on_are_not_read(tmp_path: Path) -> None:
    assert Thermometer(boards.plant(tmp_path, boards.X86_N100)).read() == 64.0


def test_the_metrics_show_what_is_measured(tmp_path: Path) -> None:
    write(tmp_path, class__hwmon__hwmon0__power1_input="7500000", class__thermal__thermal_zone0__temp="50000")
    stats = SchedulerStats(0, 0, slots=1, max_queue=1, accepting=True, seconds_since_progress=0.0)
    text = Metrics(Sensors(Thermometer(tmp_path), EnergyMeter(tmp_path, Clock()))).render(stats).decode()
    assert "qwedge_power_watts 7.5\n" in text
    assert "qwedge_temperature_celsius 50.0\n" in text
    assert "qwedge_power_watts NaN\n" in Metrics().render(stats).decode()
