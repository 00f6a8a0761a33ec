"""The commands of keys and store with a real model: from `qwedge keys init` to a served bundle that is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import httpx
import pytest

import edge.cli
from edge.bundle import WEIGHTS, read_manifest
from edge.commands import trial
from edge.commands.trial import Start
from edge.config import load_settings
from edge.engine.engine import Engine
from edge.errors import SignatureError
from edge.scheduler_stats import STALLED_AFTER_S, SchedulerStats
from edge.service import Service
from edge.signing import PrivateKey, Trust, make_keys
from edge.store import Store, open_source
from tests.command_line import Run, command_runner
from tests.edge.bundles import write_bundle
from tests.export import tiny
from tests.serving import wait_for

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, "plant")
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> list[Path]:
    """Two signed bundles of one model, with the counters 1 and 2."""
    folder = tmp_path_factory.mktemp("bundles")
    made = []
    for counter in (1, 2):
        checkpoint = tiny.write_folder(folder / f"checkpoint{counter}", tiny.qwen2_config(), seed=counter)
        output = folder / f"bundle{counter}"
        options = ["--name", "tiny", "--counter", str(counter), "--sign", str(keys / "plant.key")]
        assert edge.cli.run(["export", str(checkpoint), "-o", str(output), *options]) == 0
        made.append(output)
    return made


@pytest.fixture
def qwedge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command, with a store of its own."""
    run = command_runner(monkeypatch, capsys)
    monkeypatch.setenv("QWEDGE_MODEL_STORE", str(tmp_path / "store"))
    return run


def test_from_the_stick_to_the_answer(qwedge: Run, bundles: list[Path], keys: Path, tmp_path: Path) -> None:
    (tmp_path / "stick").mkdir()
    for number, bundle in enumerate(bundles):
        subprocess.run(["tar", "-cf", tmp_path / "stick" / f"v{number}.tar", "-C", bundle, "."], check=True)
    several = qwedge("install", tmp_path / "stick", "--trust", keys)
    assert (several.status, several.stderr) == (
        2,
        f"error: there are 2 bundles in {tmp_path / 'stick'}\nhint: name one: v0.tar, v1.tar\n",
    )
    first = qwedge("install", tmp_path / "stick" / "v0.tar", "--trust", keys, "--activate", "--json")
    assert first.status == 0, first.stderr
    assert json.loads(first.stdout).items() >= {"signed_by": "plant", "counter": 1, "active": True}.items()
    (tmp_path / "stick" / "v0.tar").unlink()
    assert qwedge("install", tmp_path / "stick").status == 0

    listed = json.loads(qwedge("list", "--json").stdout)
    second = next(each["name"] for each in listed if each["counter"] == 2)
    assert [each["active"] for each in listed] == [each["name"] != second for each in listed]
    answer = qwedge("generate", "hello", "--raw", "--max-tokens", "4", "--json")
    assert json.loads(answer.stdout)["choices"][0]["finish_reason"] in {"length", "stop"}
    assert qwedge("activate", second, "--no-test").status == 0
    assert "active" in qwedge("list").stdout
    assert qwedge("verify").stdout.startswith("ok: tiny 1, balanced")
    assert qwedge("remove", second).status == 7
    gone = qwedge("activate", "nothing")
    assert (gone.status, gone.stderr.splitlines()[0]) == (7, "error: there is no bundle nothing")


def test_verify_says_who_signed(qwedge: Run, bundles: list[Path], keys: Path, tmp_path: Path) -> None:
    key_id = PrivateKey.load(keys / "plant.key").key_id
    assert f"signed by plant (key {key_id})" in qwedge("verify", bundles[0], "--trust", keys).stdout
    unchecked = json.loads(qwedge("verify", bundles[0], "--json").stdout)
    assert (unchecked["key_id"], unchecked["signed_by"]) == (key_id, None)
    unsigned = write_bundle(tmp_path / "unsigned")
    assert qwedge("verify", unsigned).stdout.splitlines()[1] == "not signed"
    refused = qwedge("verify", unsigned, "--trust", keys)
    assert (refused.status, refused.stderr.splitlines()[0]) == (5, f"error: {unsigned} is not signed")


def test_keys_and_sign(qwedge: Run, tmp_path: Path) -> None:
    made = qwedge("keys", "init", "line-3", "--folder", tmp_path / "keys")
    assert qwedge("keys", "init", "line-3", "--folder", tmp_path / "keys").status == 2
    listed = json.loads(qwedge("keys", "list", "--folder", tmp_path / "keys", "--json").stdout)
    assert listed == [{"name": "line-3", "key_id": made.stdout.strip(), "private": True}]
    bundle = write_bundle(tmp_path / "bundle")
    assert qwedge("sign", bundle, "--key", tmp_path / "keys" / "line-3.key").status == 0
    assert "signed by line-3" in qwedge("verify", bundle, "--trust", tmp_path / "keys").stdout


@pytest.fixture
def opened(keys: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What onnxruntime is asked to open, by somebody who trusts the keys."""
    opened: list[object] = []
    monkeypatch.setattr("edge.engine.engine.Session", lambda *args, **_: opened.append(args))
    monkeypatch.setenv("QWEDGE_MODEL_TRUST", str(keys))
    monkeypatch.setenv("QWEDGE_SERVER_PORT", "0")
    return opened


@pytest.mark.parametrize("command", ["generate", "bench", "serve"])
def test_nothing_that_nobody_signed_is_opened(
    qwedge: Run, opened: list[object], bundles: list[Path], tmp_path: Path, command: str
) -> None:
    unsigned = tmp_path / "unsigned"
    shutil.copytree(bundles[0], unsigned)
    (unsigned / "manifest.sig").unlink()
    done = qwedge(command, "--bundle", unsigned, *(["hello"] if command == "generate" else []))
    assert done.status == 5, done.stderr
    assert f"error: {unsigned} is not signed" in done.stderr
    assert opened == []


def test_it_does_not_wake_up_once_its_key_is_not_trusted(bundles: list[Path], keys: Path, tmp_path: Path) -> None:
    trusted = tmp_path / "trusted"
    shutil.copytree(keys, trusted)
    engine = Engine(bundles[0], read_manifest(bundles[0]), slots=1, context=32, threads=1, trust=Trust(trusted))
    engine.sleep()
    engine.wake()
    engine.sleep()
    (trusted / "plant.pub").unlink()
    make_keys(trusted, "another")
    with pytest.raises(SignatureError, match="which is not trusted"):
        engine.wake()


@dataclass
class Server:
    """A running `qwedge serve` of the store."""

    process: subprocess.Popen[str]
    url: str
    log: Path


@contextmanager
def serving(tmp_path: Path) -> Iterator[Server]:
    """Serve what is active until the block ends, which kills the server."""
    log = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QWEDGE_")}
    environment |= {"QWEDGE_MODEL_STORE": str(tmp_path / "store"), "XDG_STATE_HOME": str(tmp_path / "state")}
    line = [sys.executable, "-m", "edge.cli", "serve", "--port", "0", "--threads", "1"]
    with (
        log.open("a") as stderr,
        subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready, log.read_text()
            yield Server(process, ready.split()[-1], log)
        finally:
            process.kill()


class TestServing:
    @pytest.fixture
    def store(self, qwedge: Run, bundles: list[Path], tmp_path: Path) -> Store:
        """The first bundle has worked, the second one is on trial."""
        store = Store(tmp_path / "store")
        for bundle in bundles:
            assert qwedge("install", bundle, "--activate", "--no-test").status == 0
            if bundle == bundles[0]:
                store.healthy(store.list()[0].name)
        return store

    def test_a_damaged_bundle_is_left_for_the_one_before(self, store: Store, tmp_path: Path) -> None:
        active = store.active()
        assert active is not None
        (active.path / WEIGHTS).write_bytes(b"")
        with serving(tmp_path) as server:
            assert httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).json()["status"] == "ok"
            assert f"{active.name} does not work" in server.log.read_text()
        assert {each.counter: (each.active, each.failed) for each in store.list()} == {
            1: (True, False),
            2: (False, True),
        }

    def test_a_bundle_that_ends_the_process_is_left(self, store: Store, tmp_path: Path) -> None:
        """The third server is killed before it has worked for a minute; the next one serves the bundle before."""
        store.starting()
        store.starting()
        served = []
        for _ in range(2):
            with serving(tmp_path):
                active = store.active()
                assert active is not None
                served.append(active.counter)
        assert served == [2, 1]

    def test_a_server_that_was_ended_on_purpose_does_not_count(self, store: Store, tmp_path: Path) -> None:
        state = store.folder / "state.json"
        with serving(tmp_path) as server:
            assert json.loads(state.read_text())["starts"] == 1
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(TIMEOUT_S) == 0
        assert json.loads(state.read_text())["starts"] == 0


@dataclass
class Progress:
    """What a trial sees of a service."""

    seconds_since_progress: float = 0.0

    def stats(self) -> SchedulerStats:
        return SchedulerStats(0, 1, 1, 1, accepting=True, seconds_since_progress=self.seconds_since_progress)


class TestTrial:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        store = Store(tmp_path / "store")
        for number in (1, 2):
            source = write_bundle(tmp_path / f"bundle{number}", counter=number)
            name = store.install(open_source(source)).name
            store.activate(name, test=False)
            if number == 1:
                store.healthy(name)
        return store

    @pytest.fixture
    def start(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
        monkeypatch.setattr(trial, "CHECK_EVERY_S", 0.01)
        start = Start(load_settings(env={}), store)
        start.installed = store.starting()
        yield start
        start.end(wanted=False)

    def test_what_has_served_for_a_while_has_worked(
        self, start: Start, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trial, "WORKS_AFTER_S", 0.1)
        start.watch(cast("Service", Progress()), lambda: None)
        wait_for(lambda: json.loads((store.folder / "state.json").read_text())["starts"] is None)
        assert json.loads((store.folder / "state.json").read_text())["counters"] == {"tiny": 2}

    def test_what_stalls_is_left_and_the_process_ends(
        self, start: Start, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ends: list[int] = []
        monkeypatch.setattr(os, "_exit", ends.append)
        service = Progress()
        start.watch(cast("Service", service), lambda: None)
        assert ends == []
        service.seconds_since_progress = STALLED_AFTER_S + 1
        wait_for(lambda: ends == [trial.EXIT_STALLED])
        active = store.active()
        assert active is not None
        assert active.counter == 1
