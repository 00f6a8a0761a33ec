"""A real ``qwedge serve`` that is managed: over HTTP, over MQTT, and by a signal."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge.mqtt.messages import Command
from edge.settings.mqtt import BrokerAddress
from edge.store import Store, open_source
from tests.edge.managed import NAMES, export_two
from tests.edge.mqtt.client import Client

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60
CONFIG = """
[engine]
threads = 1
slots = 2
context = 128

[mqtt]
broker = "embedded"
port = {mqtt}
device = "managed"
management = true
"""


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    broker: BrokerAddress
    config: Path
    log: Path

    def get(self) -> Any:
        return httpx.get(f"{self.url}/v1/bundles", timeout=TIMEOUT_S).json()

    def post(self, path: str) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=TIMEOUT_S)

    def end(self) -> Any:
        """The operation, once it has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while (operation := self.get()["operation"])["state"] == "running":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return operation

    def wait_ready(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ready: "):
                return line
        pytest.fail(self.log.read_text())


@contextmanager
def serving(exported: Path, folder: Path) -> Iterator[Server]:
    store = Store(folder / "store")
    for name in NAMES:
        store.install(open_source(exported / name))
    store.healthy(store.activate("first", test=False).name)
    http, mqtt = free_ports(2)
    config, log = folder / "qwedge.toml", folder / "log"
    config.write_text(CONFIG.format(mqtt=mqtt))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QWEDGE_")}
    environment |= {"QWEDGE_MODEL_STORE": str(store.folder), "XDG_STATE_HOME": str(folder / "state")}
    line = [sys.executable, "-m", "edge.cli", "serve", "--port", str(http), "--config", str(config)]
    with (
        log.open("a") as stderr,
        subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        server = Server(process, f"http://127.0.0.1:{http}", BrokerAddress("127.0.0.1", mqtt), config, log)
        try:
            server.wait_ready()
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) == 0, log.read_text()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if shutil.which("mosquitto") is None and shutil.which("mosquitto", path="/usr/sbin") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("this test needs mosquitto: apt-get install mosquitto")
    folder = tmp_path_factory.mktemp("managed")
    with serving(export_two(folder), folder) as server:
        yield server


def model(server: Server) -> str:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "?", "max_tokens": 2}, timeout=TIMEOUT_S)
    return str(answer.json()["model"])


def test_models_are_switched_verified_and_rolled_back_over_http(server: Server) -> None:
    listed = server.get()
    assert [(bundle["model"], bundle["active"]) for bundle in listed["bundles"]] == [("first", True), ("second", False)]
    assert listed["served"] == listed["bundles"][0]["name"]
    assert "path" not in listed["bundles"][0]
    begun = server.post("/v1/bundles/second/switch")
    assert begun.status_code == 202
    assert begun.json()["kind"] == "switch"
    assert server.end() == begun.json() | {"state": "done", "step": "", "progress": 1.0}
    assert model(server) == "second"
    models = httpx.get(f"{server.url}/v1/models", timeout=TIMEOUT_S).json()["data"]
    assert [model["id"] for model in models] == ["second"]
    assert httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).json()["model"] == "second"
    assert server.post("/v1/bundles/first/verify").status_code == 202
    assert server.end()["state"] == "done"
    assert server.post("/v1/bundles/rollback").status_code == 202
    assert server.end()["state"] == "done"
    assert model(server) == "first"


def test_weights_are_unloaded_and_loaded(server: Server) -> None:
    assert server.post("/v1/device/unload").status_code == 204
    deadline = time.monotonic() + TIMEOUT_S
    while not httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).json()["asleep"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.post("/v1/device/load").status_code == 204
    assert not httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).json()["asleep"]


def test_what_is_not_there_is_refused(server: Server) -> None:
    missing = server.post("/v1/bundles/third/switch")
    assert missing.status_code == 404
    error = missing.json()["error"]
    assert (error["code"], error["message"]) == ("bundle_not_found", "there is no bundle third")
    assert httpx.get(f"{server.url}/v1/bundles/first/switch", timeout=TIMEOUT_S).status_code == 405


def test_a_restart_over_mqtt_is_the_same_process_and_told_to_be_done_when_it_is_back(server: Server) -> None:
    topic = "qwedge/v1/dev/managed/cmd/restart/7"
    uptime = httpx.get(f"{server.url}/v1/device", timeout=TIMEOUT_S).json()["uptime_s"]
    with Client(server.broker, "operator", "managed", extra=(topic,)) as operator:
        operator.publish(topic, Command(status="init").encode(), retain=True)
        server.wait_ready()
        assert server.process.poll() is None
    with Client(server.broker, "operator", "managed", extra=(topic,)) as operator:
        operator.wait(
            lambda: [m for m in operator.received if m.topic == topic and m.value.status == "successful"], TIMEOUT_S
        )
    assert httpx.get(f"{server.url}/v1/device", timeout=TIMEOUT_S).json()["uptime_s"] < uptime + TIMEOUT_S
    assert model(server) == "first"


def test_settings_are_read_anew_where_they_can_be_used(server: Server) -> None:
    sound = server.config.read_text()
    server.config.write_text(sound.replace("slots = 2", "slots = 0"))
    refused = server.post("/v1/device/reload")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "config_invalid")
    assert "slots" in refused.json()["error"]["message"]
    server.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + TIMEOUT_S
    while "the settings are not reloaded" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.config.write_text(sound.replace("slots = 2", "slots = 3"))
    server.process.send_signal(signal.SIGHUP)
    server.wait_ready()
    assert httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).json()["queue"]["slots"] == 3
