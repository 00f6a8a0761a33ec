"""A service that ends by itself again and again: counted, and in the end without what may have ended it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

from edge import starts
from edge.commands import trial
from edge.commands.safe_mode import SAFE_CONTEXT, safe_settings
from edge.commands.trial import Start, starting
from edge.config import load_settings
from edge.errors import ConfigError
from edge.settings.rules import RuleSettings
from edge.starts import MAX_DEATHS, StartCounter, Starts, boot_id, read_starts
from edge.store import Installed
from edge.store.state import State
from tests.edge.bundles import write_bundle
from tests.export import tiny
from tests.serving import wait_for
from tests.tiny_bundles import export_tiny

if TYPE_CHECKING:
    from edge.service import Service

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60
CONFIG = """
[model]
bundle = "{folder}/bundle"
adapters = "{folder}/adapters"

[engine]
threads = 1
slots = 4
prefix_store = "{folder}/prefixes"

[mqtt]
device = "edge-7"
"""


def die(folder: Path, bundle: str = "tiny", boot: str | None = None) -> int:
    """A start that ends by itself."""
    counter = StartCounter(folder, boot_id() if boot is None else boot)
    deaths = counter.begin(bundle)
    counter.close()
    return deaths


class TestCounter:
    def test_starts_that_end_by_themselves_are_counted_in_a_row(self, tmp_path: Path) -> None:
        assert [die(tmp_path) for _ in range(4)] == [0, 1, 2, 3]
        counter = StartCounter(tmp_path, boot_id())
        assert counter.begin("tiny") == 4
        counter.works(1.5)
        counter.close()
        assert read_starts(tmp_path) == Starts(bundle="tiny", boot=boot_id(), ready_s=1.5)
        assert die(tmp_path) == 0

    def test_another_bundle_begins_anew(self, tmp_path: Path) -> None:
        assert [die(tmp_path, name) for name in ("one", "one", "two", "two", "one")] == [0, 1, 0, 1, 0]

    def test_so_does_a_machine_that_was_turned_off_and_on(self, tmp_path: Path) -> None:
        assert [die(tmp_path, boot=boot) for boot in ("1", "1", "2", "2", "2")] == [0, 1, 0, 1, 2]

    def test_a_second_process_counts_nothing(self, tmp_path: Path) -> None:
        first, second = StartCounter(tmp_path, "1"), StartCounter(tmp_path, "1")
        assert first.begin("tiny") == 0
        assert second.begin("tiny") == 0
        second.works()  # nor does it take the first one's start back
        second.close()
        assert read_starts(tmp_path).unproven == 1
        first.close()

    @pytest.mark.parametrize("content", ["", "{", '{"unproven": -1}', '{"unproven": 9, "schema_version": 2}'])
    def test_a_file_that_says_nothing_sensible_counts_as_none(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "starts.json").write_text(content)
        assert die(tmp_path) == 0

    def test_a_disk_that_refuses_keeps_nobody_from_starting(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_args: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        for _ in range(5):
            die(tmp_path)
        monkeypatch.setattr(os, "fsync", refuse)
        assert die(tmp_path) == 0
        counter = StartCounter(None, "1")
        assert counter.begin("tiny") == 0
        counter.works()


def test_what_safe_mode_leaves_out() -> None:
    rule = RuleSettings(name="meter", subscribe="a", prompt="p", publish="b")
    flags = {"model.adapters": "adapters", "engine.prefix_store": "prefixes", "engine.slots": 8, "mqtt.rule": (rule,)}
    safe = safe_settings(load_settings(flags=flags), 4096)
    assert (safe.engine.slots, safe.engine.context, safe.engine.draft_tokens) == (1, SAFE_CONTEXT, 0)
    assert (safe.engine.prefix_cache_mb, safe.engine.prefix_store) == (0, None)
    assert (safe.model.adapters, safe.mqtt.rule) == (None, ())
    assert safe.server == load_settings(flags=flags).server  # who reaches it, and with what key, stays
    assert safe_settings(load_settings(flags={"engine.context": 300}), 256).engine.context == 256


class Idle:
    """A service that never stalls."""

    stalled = False
    num_running = num_waiting = 0

    def stats(self) -> Idle:
        return self


def crash(start: Any, before: Callable[[Start], object], kind: type[BaseException] = RuntimeError) -> None:
    """A start that ends with an exception."""
    with suppress(kind), start() as served:
        served.begin()
        before(served)
        raise kind("on purpose")


def begin_anew_by_itself(start: Any, meanwhile: Callable[[Start], object] = lambda _served: None) -> None:
    """A start in safe mode, until it tries a normal one."""
    asked = threading.Event()
    with start() as served:
        served.begin()
        assert served.problem is not None
        served.watch(cast("Service", Idle()), asked.set)
        meanwhile(served)
        assert asked.wait(TIMEOUT_S)
        served.leaving()


class TestStart:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        write_bundle(tmp_path / "bundle")
        monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
        return tmp_path / "state" / "edge-7"

    @pytest.fixture
    def start(self, folder: Path) -> Any:
        flags = {"model.bundle": folder.parents[1] / "bundle", "mqtt.device": "edge-7"}
        return lambda: starting(load_settings(flags=flags))

    def test_the_fourth_start_is_safe_and_the_one_after_a_wanted_end_is_not(self, start: Any, folder: Path) -> None:
        problems: list[str | None] = []
        for _ in range(MAX_DEATHS):
            crash(start, lambda served: problems.append(served.problem))
        assert problems == [None] * MAX_DEATHS
        with start() as served:
            served.begin()
            assert served.problem is not None
            assert served.settings.engine.slots == 1
        assert read_starts(folder).unproven == 0
        with start() as served:
            served.begin()
            assert served.problem is None

    def test_an_operator_who_interrupts_it_is_no_crash(self, start: Any, folder: Path) -> None:
        crash(start, lambda _served: None, KeyboardInterrupt)
        assert read_starts(folder).unproven == 0

    def test_a_start_that_has_served_for_a_while_is_none_either(
        self, start: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trial, "CHECK_EVERY_S", 0.01)
        monkeypatch.setattr(trial, "WORKS_AFTER_S", 0.05)

        def serve_for_a_while(served: Start) -> None:
            served.ready()
            served.watch(cast("Service", Idle()), lambda: None)
            wait_for(lambda: read_starts(folder).unproven == 0)

        die(folder, "bundle")
        crash(start, serve_for_a_while)
        assert read_starts(folder).unproven == 0
        assert read_starts(folder).ready_s is not None

    @pytest.fixture
    def dead(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Starts that ended by themselves: the next is in safe mode, and tries without it soon."""
        monkeypatch.setattr(trial, "CHECK_EVERY_S", 0.01)
        monkeypatch.setattr(starts, "RETRY_AFTER_S", 0.05)
        for _ in range(MAX_DEATHS):
            die(folder, "bundle")

    @pytest.fixture
    def tried(self, start: Any, dead: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """A start in safe mode that has begun anew by itself."""
        del dead
        monkeypatch.setattr(trial, "WORKS_AFTER_S", 0.01)
        begin_anew_by_itself(start)

    @pytest.mark.usefixtures("dead")
    def test_safe_mode_tries_a_normal_start_after_a_switch_too(self, start: Any, folder: Path) -> None:
        other = Installed.read(folder.parents[1] / "bundle", State(), trust=None)
        begin_anew_by_itself(start, lambda served: served.switched(other))

    @pytest.mark.usefixtures("tried")
    def test_safe_mode_tries_a_normal_start_and_one_that_works_ends_it(self, start: Any, folder: Path) -> None:
        with start() as served:
            served.begin()
            assert served.problem is None
            served.watch(cast("Service", Idle()), lambda: None)
            wait_for(lambda: read_starts(folder) == Starts(bundle="bundle", boot=boot_id()))

    @pytest.mark.usefixtures("tried")
    @pytest.mark.parametrize("kind", [RuntimeError, ConfigError])
    def test_whatever_ends_that_start_leads_back_to_safe_mode(
        self, start: Any, folder: Path, kind: type[BaseException]
    ) -> None:
        crash(start, lambda served: served.problem, kind)
        with start() as served:
            served.begin()
            assert served.problem is not None
            assert served.problem.endswith(f"after {2 * starts.RETRY_AFTER_S / 3600:g} h")  # twice as long
        assert read_starts(folder).retries == 1


# --- a real process, killed -----------------------------------------------------------------------------------------


@contextmanager
def serve(folder: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QWEDGE_")}
    line = [sys.executable, "-m", "edge.cli", "serve", "--port", "0", "--config", str(folder / "qwedge.toml")]
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(
            line,
            cwd=ROOT,
            env=environment | {"STATE_DIRECTORY": str(folder / "state")},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def test_a_service_that_is_killed_three_times_starts_in_safe_mode(tmp_path: Path) -> None:
    """Its folder of adapters does not go with the bundle: as it is configured, it never starts."""
    export_tiny(tmp_path, tiny.qwen2_config(), name="tiny")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "qwedge.toml").write_text(CONFIG.format(folder=tmp_path))
    state = tmp_path / "state" / "edge-7"
    for number in range(1, MAX_DEATHS + 1):
        with serve(tmp_path) as process:
            wait_for(lambda number=number: read_starts(state).unproven == number, TIMEOUT_S)
            process.send_signal(signal.SIGKILL)
    with serve(tmp_path) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith("ready: tiny at "), (tmp_path / "log").read_text()
        url = ready.split()[-1]
        health = httpx.get(f"{url}/health", timeout=TIMEOUT_S)
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        assert "safe mode" in health.json()["problem"]
        asked = httpx.post(f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 2}, timeout=TIMEOUT_S)
        assert asked.status_code == 200
        assert not (tmp_path / "prefixes").exists()
        assert json.loads((state / "starts.json").read_text())["unproven"] == MAX_DEATHS + 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    assert read_starts(state).unproven == 0
