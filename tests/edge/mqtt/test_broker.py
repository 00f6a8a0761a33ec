"""The embedded mosquitto: private, supervised, gone when we are gone, and clear when it cannot run."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge.errors import UnavailableError
from edge.mqtt import EmbeddedBroker, broker_program
from edge.mqtt.broker_config import make_config
from edge.mqtt.broker_program import find_mosquitto, mosquitto_version
from edge.settings.mqtt import BrokerAddress
from tests.edge.mqtt.client import Client
from tests.edge.mqtt.conftest import accepts, wait_until

pytestmark = pytest.mark.broker


def test_it_listens_on_loopback_only_and_ends_with_stop() -> None:
    own = EmbeddedBroker(0)
    own.start()
    pid = own.pid
    assert pid is not None
    listening = subprocess.run(["cat", f"/proc/{pid}/net/tcp"], capture_output=True, text=True, check=True).stdout
    hex_port = f"{own.address.port:04X}"
    rows = [line.split() for line in listening.splitlines()[1:]]
    assert {row[1] for row in rows if row[1].endswith(f":{hex_port}") and row[3] == "0A"} == {f"0100007F:{hex_port}"}
    own.stop()
    assert own.pid is None
    assert not Path(f"/proc/{pid}").exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", own.address.port)) != 0


def test_its_files_are_private_and_removed() -> None:
    with EmbeddedBroker(0) as own:
        assert own._config is not None
        folder = Path(own._config.name)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert (folder / "mosquitto.conf").exists()
    assert not folder.exists()


def test_state_survives_where_it_has_a_place(tmp_path: Path) -> None:
    state = tmp_path / "state"
    topic = "qwedge/v1/res/keeper/note"
    with EmbeddedBroker(0, state_dir=state) as own, Client(own.address, "keeper", "none") as client:
        client.publish(topic, b"kept", retain=True)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    with EmbeddedBroker(0, state_dir=state) as own, Client(own.address, "keeper", "none") as client:
        client.wait(lambda: [message.value for message in client.received] == [b"kept"])


def test_it_is_started_again_when_it_dies() -> None:
    with EmbeddedBroker(0) as own:
        first = own.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: own.restarts == 1 and own.pid not in {None, first})
        with Client(_listening(own), "survivor", "none") as client:
            client.publish("qwedge/v1/res/survivor/x", b"y")
            client.wait(lambda: client.received)


def test_it_dies_with_its_parent() -> None:
    code = (
        "import sys, time; from edge.mqtt import EmbeddedBroker; b = EmbeddedBroker(0); b.start();"
        "print(b.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    wait_until(lambda: not _runs(child))


def test_a_taken_port_is_told_with_a_hint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"port {port} cannot be used") as caught:
            EmbeddedBroker(port).start()
    assert f"mqtt://127.0.0.1:{port}" in caught.value.hint


def test_a_missing_mosquitto_is_told_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(broker_program, "_SEARCH_PATH", "/nowhere")
    with pytest.raises(UnavailableError, match="not installed") as caught:
        EmbeddedBroker(0).start()
    assert "apt-get install mosquitto" in caught.value.hint


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'mosquitto version 1.6.12'", "1.6.12 is too old"),
        ("echo something else", "of unknown version is too old"),
        ("[ $1 = -h ] && echo 'mosquitto version 2.0.18' || { echo Error: no luck >&2; exit 1; }", "no luck"),
    ],
)
def test_a_mosquitto_that_cannot_serve_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    program = tmp_path / "mosquitto"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UnavailableError, match=message):
        EmbeddedBroker(0).start()


def test_the_configuration_lets_nobody_in_from_outside() -> None:
    lines = make_config(1883, None).splitlines()
    assert "listener 1883 127.0.0.1" in lines
    assert "set_tcp_nodelay true" in lines
    assert "persistence false" in lines
    assert [line for line in lines if line.startswith("listener")] == ["listener 1883 127.0.0.1"]


def test_the_installed_mosquitto_has_a_version() -> None:
    assert mosquitto_version(find_mosquitto()) >= (2, 0)


def _listening(own: EmbeddedBroker) -> BrokerAddress:
    wait_until(lambda: accepts(own.address.port))
    return own.address


def _runs(pid: int) -> bool:
    """Whether a process runs; an orphan that nobody reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
