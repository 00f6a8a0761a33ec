"""Slower before it gets too hot or draws too much: simulated machines close the loop, a real server does the work."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

import edge.loader
import edge.scheduler
import edge.throttle
from edge.bundle import read_manifest
from edge.config import load_settings
from edge.errors import ConfigError
from edge.loader import load_service
from edge.mqtt.presence import make_load
from edge.power import EnergyMeter, Sensors, Thermometer
from edge.scheduler_stats import STALLED_AFTER_S
from edge.service import Delta, Event, Finished, PromptScored, Service
from edge.throttle import FULL_SPEED, LEVELS, MAX_PAUSE_S, Governor, Limits, Throttle, ThrottleState
from tests.edge.test_engine import export_for_bits, prompt
from tests.edge.test_scheduler import Client, running
from tests.fakes import FakeEngine, make_service
from tests.serving import serving, wait_for

HEAT = Limits(from_c=72, until_c=80)
SLOWEST = 1 - LEVELS / 16


class Clock:
    """Time that goes on when it is told to; it begins now, beside the clocks that are not replaced."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


@dataclass
class Machine:
    """It warms up by what it draws, and shows both to whom it is asked by.

    Each of ``parts`` between chip and air is so many degrees warmer for a watt, after so many seconds: the chip within
    a few, its heat sink or case within minutes.
    """

    parts: tuple[tuple[float, float], ...] = ((2.0, 3.0), (6.0, 120.0))
    ambient_c: float = 25.0
    idle_w: float = 2.5
    work_w: float = 5.0
    """On top of that, at full speed."""
    noise_c: float = 0.0
    clock: Clock = field(default_factory=Clock)
    watts: float = 0.0

    def __post_init__(self) -> None:
        self._warmer = [kelvin * self.idle_w for kelvin, _ in self.parts]
        self._random = random.Random(7)

    @property
    def celsius(self) -> float:
        return self.ambient_c + sum(self._warmer)

    @property
    def told_c(self) -> float:
        """What a sensor tells, in whole degrees."""
        return float(round(self.celsius + self._random.uniform(-self.noise_c, self.noise_c)))

    def spend(self, seconds: float, speed: float) -> None:
        """Let time pass at a part of the full speed."""
        self.watts = self.idle_w + self.work_w * speed
        for _ in range(round(seconds / 0.1)):
            for part, (kelvin, after_s) in enumerate(self.parts):
                self._warmer[part] += (kelvin * self.watts - self._warmer[part]) * 0.1 / after_s
        self.clock.advance(seconds)


class Tree:
    """A tree like ``/sys``, and what slows down by it."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self._temperature = root / "class/thermal/thermal_zone0/temp"
        self._power = root / "class/hwmon/hwmon0/power1_input"
        for file in (self._temperature, self._power):
            file.parent.mkdir(parents=True)
        self.set(25.0, 0.0)
        self.clock = clock
        self.sensors = Sensors(Thermometer(root), EnergyMeter(root, clock))

    def set(self, celsius: float, watts: float = 0.0) -> None:
        self._temperature.write_text(f"{celsius * 1000:.0f}\n")
        self._power.write_text(f"{watts * 1e6:.0f}\n")

    def throttle(self, limits: Limits) -> Throttle:
        return Throttle(limits, self.sensors, clock=self.clock, wait=self.clock.advance)


@dataclass(frozen=True)
class Run:
    """What happened, second by second."""

    celsius: list[float]
    watts: list[float]
    levels: list[int]

    def swings(self) -> list[int]:
        """When the level rose again after a fall."""
        changes = [
            (second, now - before) for second, (before, now) in enumerate(pairwise(self.levels)) if now != before
        ]
        return [second for (_, last), (second, this) in pairwise(changes) if last < 0 < this]


Look = Callable[[], ThrottleState]


def governed(machine: Machine, limits: Limits) -> Look:
    """By the plain values."""
    governor = Governor(limits)
    return lambda: governor.look(machine.clock.now, machine.told_c, machine.watts)


def through_tree(machine: Machine, tree: Tree, throttle: Throttle) -> Look:
    """By what stands in files."""

    def look() -> ThrottleState:
        tree.set(machine.told_c, machine.watts)
        throttle.look()
        return throttle.state

    return look


def run(machine: Machine, look: Look, seconds: int, load: Callable[[int], float] = lambda _: 1.0) -> Run:
    """Work as fast as it may, and look once a second."""
    happened = Run([], [], [])
    state = look()
    for second in range(seconds):
        machine.spend(1.0, state.speed * load(second))
        state = look()
        happened.watts.append(machine.watts)
        happened.celsius.append(machine.celsius)
        happened.levels.append(state.level)
    return happened


PLANTS = {
    "a bare board": {},
    "in a hot box": {"ambient_c": 40.0},
    "with a large heat sink": {"parts": ((2.0, 3.0), (5.0, 300.0)), "ambient_c": 32.0},
    "a quick chip and a noisy sensor": {"parts": ((2.5, 0.5), (3.5, 90.0)), "work_w": 8.0, "noise_c": 1.0},
}


@pytest.mark.parametrize("plant", PLANTS)
def test_it_stays_below_the_limit_and_does_not_swing(plant: str) -> None:
    machine = Machine(**PLANTS[plant])  # type: ignore[arg-type]
    at_full_speed = machine.ambient_c + sum(kelvin for kelvin, _ in machine.parts) * (machine.idle_w + machine.work_w)
    assert at_full_speed > 80, "else this is no test"
    happened = run(machine, governed(machine, HEAT), 2400)
    assert max(happened.celsius) < 80
    assert min(happened.celsius[1200:]) > 70, "it is no slower than it has to be"
    assert all(later - earlier >= 60 for earlier, later in pairwise(happened.swings()))
    late = happened.levels[1200:]
    assert max(late) - min(late) <= 4, "a steady load gets a steady speed"


def test_it_does_so_by_what_stands_in_files_and_recovers_when_the_load_is_gone(tmp_path: Path) -> None:
    machine = Machine()
    tree = Tree(tmp_path, machine.clock)
    throttle = tree.throttle(HEAT)
    happened = run(machine, through_tree(machine, tree, throttle), 400)
    assert max(happened.celsius) < 80
    assert throttle.state.reason == "heat"
    run(machine, through_tree(machine, tree, throttle), 200, load=lambda _: 0.0)
    assert throttle.state == FULL_SPEED


def test_bursts_do_not_make_it_swing() -> None:
    machine = Machine(ambient_c=45.0)
    happened = run(machine, governed(machine, HEAT), 2400, load=lambda second: float(second // 20 % 2))
    assert max(happened.celsius) < 80
    assert len(happened.swings()) > 1
    assert all(later - earlier >= 60 for earlier, later in pairwise(happened.swings()))


def test_a_machine_that_stays_too_hot_is_never_stopped() -> None:
    machine = Machine(ambient_c=79.0)
    assert run(machine, governed(machine, HEAT), 60).levels[-1] == LEVELS
    assert ThrottleState(LEVELS, "heat").speed == SLOWEST == 0.25


@pytest.mark.parametrize("idle_w", [1.0, 3.0, 5.0])
def test_power_is_kept_below_its_limit_and_near_it(idle_w: float) -> None:
    machine = Machine(idle_w=idle_w, work_w=9.0)
    happened = run(machine, governed(machine, Limits(max_w=8)), 600)
    assert happened.levels.index(next(filter(None, happened.levels))) <= 7, "the first step comes within seconds"
    late = happened.watts[60:]
    assert max(late) <= 8
    assert sum(late) / len(late) > 8 - 2 * machine.work_w / 16
    assert len(set(happened.levels[60:])) == 1


def test_energy_that_is_counted_in_files_is_kept_below_its_limit(tmp_path: Path) -> None:
    machine = Machine(work_w=9.0)
    tree = Tree(tmp_path, machine.clock)
    throttle = tree.throttle(Limits(max_w=8))
    happened = run(machine, through_tree(machine, tree, throttle), 100)
    assert happened.watts[0] == 11.5
    assert max(happened.watts[60:]) <= 8
    assert throttle.state.reason == "power"


def test_what_was_drawn_before_a_rest_does_not_count() -> None:
    governor = Governor(Limits(max_w=8))
    for second in range(10):
        governor.look(second, None, 2.0)
    levels = [governor.look(1000 + second, None, 11.5).level for second in range(7)]
    assert levels[:5] == [0] * 5
    assert levels[6] > 0


def test_the_reason_is_what_asks_for_more() -> None:
    machine = Machine()
    governor = Governor(Limits(from_c=72, until_c=80, max_w=6))
    run(machine, lambda: governor.look(machine.clock.now, 50.0, machine.watts), 20)
    assert governor.state.reason == "power"
    assert governor.look(machine.clock.now, 79.9, machine.watts) == ThrottleState(LEVELS, "heat")


class TimedEngine(FakeEngine):
    """Its steps take time of a clock, none of ours."""

    def __init__(self, clock: Clock, **options: object) -> None:
        super().__init__(reply=lambda _: "x" * 120, **options)  # type: ignore[arg-type]
        self.seconds_per_step = 0.05
        self._clock = clock

    def _step(self) -> None:
        super()._step()
        self._clock.advance(self.seconds_per_step)


@dataclass
class Throttled:
    """A real server over an engine whose machine gets hot when it is told to."""

    tree: Tree
    engine: TimedEngine
    throttle: Throttle
    service: Service
    client: httpx.Client

    def ask(self) -> tuple[str, float]:
        """An answer, and how many engine steps a second it took, by the engine's clock."""
        steps, began = self.engine.num_steps, self.tree.clock.now
        answer = self.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        wait_for(lambda: self.service.stats().num_running == 0)
        text = answer.raise_for_status().json()["choices"][0]["message"]["content"]
        return text, (self.engine.num_steps - steps) / (self.tree.clock.now - began)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A request hangs in its first step."""
        self.engine.gate.clear()
        client = Client(self.service)
        wait_for(lambda: self.service.stats().num_running == 1)
        yield
        self.engine.gate.set()
        client.end()

    def heat_up(self) -> None:
        with self.at_work():  # at rest nobody would look
            self.tree.set(90)
            wait_for(lambda: self.throttle.state.level == LEVELS)


@pytest.fixture
def throttled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Throttled]:
    monkeypatch.setattr(edge.throttle, "LOOK_EVERY_S", 0.005)
    tree = Tree(tmp_path, Clock())
    monkeypatch.setattr(edge.scheduler, "time", SimpleNamespace(monotonic=tree.clock))
    engine, throttle = TimedEngine(tree.clock), tree.throttle(HEAT)
    service = make_service(engine, throttle=throttle)
    with (
        serving(service, load_settings().server.model_copy(update={"port": 0})) as (host, port),
        httpx.Client(base_url=f"http://{host}:{port}", timeout=20) as client,
    ):
        yield Throttled(tree, engine, throttle, service, client)


def test_a_hot_server_answers_the_same_in_the_promised_proportion(throttled: Throttled) -> None:
    cool, speed = throttled.ask()
    assert speed == pytest.approx(1 / 0.05)
    throttled.heat_up()
    hot, slow = throttled.ask()
    assert hot == cool
    # The last step's pause may be under way still.
    assert slow / speed == pytest.approx(SLOWEST, rel=0.02)
    told = throttled.client.get("/v1/device").json()
    assert told["throttle"] == {"level": LEVELS, "reason": "heat", "speed": 0.25}
    assert told["firmware_throttling"] == {"now": [], "since_boot": []}
    figures = throttled.client.get("/metrics").text
    assert f"qwedge_throttle_level {LEVELS}.0\n" in figures
    assert "qwedge_speed_ratio 0.25\n" in figures
    load = make_load(throttled.service, 1.0)
    assert (load.speed, load.slowed_by) == (0.25, "heat")
    throttled.tree.set(50)
    for level in reversed(range(LEVELS)):  # nobody asks: it still gets faster
        throttled.tree.clock.advance(60)
        wait_for(lambda wanted=level: throttled.throttle.state.level == wanted)  # type: ignore[misc]
    assert throttled.ask()[1] == pytest.approx(speed)
    assert make_load(throttled.service, 1.0).speed is None


def test_a_long_pause_is_no_stall(throttled: Throttled) -> None:
    throttled.heat_up()
    throttled.engine.seconds_per_step = 20.0
    seen: list[tuple[float, float]] = []

    def wait(seconds: float) -> None:
        throttled.tree.clock.advance(seconds)
        seen.append((seconds, throttled.service.stats().seconds_since_progress))

    throttled.throttle._wait = wait
    throttled.ask()
    assert len(seen) > 100
    assert max(seen) == pytest.approx((MAX_PAUSE_S, MAX_PAUSE_S))
    assert MAX_PAUSE_S + 20.0 < STALLED_AFTER_S


def test_prompts_are_read_in_smaller_chunks_so_that_running_answers_wait_no_longer(throttled: Throttled) -> None:
    throttled.heat_up()
    steps = throttled.engine.num_steps
    Client(throttled.service, "y" * 640, max_tokens=1).end()
    assert throttled.engine.num_steps - steps == 640 / 16, "64 at once at full speed"
    assert throttled.throttle.chunk(8) == 8


def test_a_real_model_answers_bit_for_bit_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.throttle, "LOOK_EVERY_S", 0.001)
    export_for_bits(tmp_path, "blocks of 128")
    tree = Tree(tmp_path / "sys", Clock())
    monkeypatch.setattr(edge.loader, "Sensors", lambda: tree.sensors)

    def answer(**power: str) -> list[Event]:
        fixed = {"THREADS": "1", "PREFILL_CHUNK": "64", "DRAFT_TOKENS": "0"}
        env = {**{f"QWEDGE_ENGINE_{name}": value for name, value in fixed.items()}, **power}
        service = load_service(tmp_path / "bundle", read_manifest(tmp_path / "bundle"), load_settings(env=env))
        service.start()
        try:
            if power:
                Client(service, prompt(3).tolist(), max_tokens=1).end()
                wait_for(lambda: service.stats().throttle.level == LEVELS)
            # One after the other: with how many others a token is computed changes the last bits of its probability.
            clients = []
            for length, options in ((37, {"score_prompt": True}), (150, {})):
                ids = prompt(length, seed=length).tolist()
                clients.append(Client(service, ids, max_tokens=12, ignore_eos=True, num_logprobs=5, **options))
                assert isinstance(clients[-1].end(), Finished)
        finally:
            service.stop()
        return [event for client in clients for event in client.events if isinstance(event, Delta | PromptScored)]

    tree.set(90)
    limits = {"QWEDGE_POWER_THROTTLE_FROM_C": "60", "QWEDGE_POWER_THROTTLE_UNTIL_C": "80"}
    told = answer(**limits)
    assert len(told) == 1 + 2 * 12
    assert told == answer()


def test_without_limits_nothing_is_looked_at() -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(name)

    throttle = Throttle(Limits(), Untouchable(), clock=Untouchable(), wait=Untouchable())  # type: ignore[arg-type]
    with running(FakeEngine(reply=lambda _: "x" * 300), throttle=throttle) as service:
        Client(service).end()
        assert "throttle" not in {thread.name for thread in threading.enumerate()}
    assert throttle.chunk(256) == 256


def test_a_cool_engine_does_nothing_for_it_and_a_resting_one_is_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge.throttle, "LOOK_EVERY_S", 0.002)
    looking: list[str] = []

    class Thermometer50:
        def read(self) -> float:
            looking.append(threading.current_thread().name)
            return 50.0

    def wait(_seconds: float) -> None:
        raise AssertionError("a cool engine pauses")

    sensors = Sensors(Thermometer50(), EnergyMeter(tmp_path))  # type: ignore[arg-type]
    engine = FakeEngine(reply=lambda _: "x" * 200)
    with running(engine, throttle=Throttle(HEAT, sensors, wait=wait)) as service:
        engine.gate.clear()
        client = Client(service)
        wait_for(lambda: len(looking) > 5)
        engine.gate.set()
        client.end()
        wait_for(lambda: no_news(looking))
    assert set(looking) == {"throttle"}, "never on the engine's thread"


def no_news(looking: list[str]) -> bool:
    before = len(looking)
    time.sleep(0.05)
    return len(looking) == before


def test_it_sleeps_while_hot_and_wakes_up_slowed_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.throttle, "LOOK_EVERY_S", 0.002)
    monkeypatch.setattr(edge.scheduler, "_REST_AFTER_S", 0.01)
    tree = Tree(tmp_path, Clock())
    tree.set(90)
    throttle, engine = tree.throttle(HEAT), FakeEngine()
    with running(engine, throttle=throttle, sleep_after_s=0.02) as service:
        Client(service).end()
        wait_for(lambda: engine.asleep and throttle.state.level == LEVELS)
        before = tree.clock.now
        assert isinstance(Client(service).end(), Finished)
        wait_for(lambda: tree.clock.now > before)  # it paused


def test_stopping_ends_a_pause() -> None:
    throttle = Throttle(HEAT)
    throttle.state = ThrottleState(LEVELS, "heat")
    resting = threading.Thread(target=throttle.rest, args=(1e9,))
    resting.start()
    throttle.stop()
    resting.join(MAX_PAUSE_S / 2)
    assert not resting.is_alive()


def test_the_log_tells_when_it_begins_and_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "edge.throttle")
    tree = Tree(tmp_path, Clock())
    throttle = tree.throttle(HEAT)
    for celsius in [60, 74, 75, 76, *[60] * 30]:
        tree.set(celsius)
        throttle.look()
        tree.clock.advance(30)
    assert [record.getMessage() for record in caplog.records] == [
        "slowed down to 81% for heat, at 74 C",
        "at full speed again, at 60 C",
    ]


def test_a_limit_that_nothing_measures_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "edge.throttle")
    sensors = Sensors(Thermometer(tmp_path), EnergyMeter(tmp_path))
    with running(FakeEngine(), throttle=Throttle(Limits(72, 80, 5), sensors)) as service:
        wait_for(lambda: len(caplog.records) == 2)
        assert isinstance(Client(service).end(), Finished)
    assert "throttle_from_c has no effect" in caplog.text
    assert "max_w has no effect" in caplog.text


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"power.throttle_from_c": 70}, "need each other"),
        ({"power.throttle_from_c": 70, "power.throttle_until_c": 72}, "at least 3 above"),
        ({"power.max_w": 0}, "greater than 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(given: dict[str, float], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_settings(flags=given)
