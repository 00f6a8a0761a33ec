"""User names and passwords, against a mosquitto that asks for them."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.errors import ConfigError
from edge.mqtt import MqttBridge
from edge.mqtt.broker_program import find_mosquitto
from edge.settings.mqtt import BrokerAddress, MqttSettings
from tests.edge.mqtt.conftest import accepts, wait_until
from tests.fakes import make_service

pytestmark = pytest.mark.broker


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[BrokerAddress]:
    """A mosquitto that lets only ``edge`` with the password ``s3cret:ü`` in."""
    program = find_mosquitto()
    passwd = shutil.which("mosquitto_passwd") or str(Path(program).with_name("mosquitto_passwd"))
    users = tmp_path / "users"
    subprocess.run([passwd, "-b", "-c", str(users), "edge", "s3cret:ü"], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = tmp_path / "mosquitto.conf"
    user = "user root\n" if os.geteuid() == 0 else ""
    config.write_text(f"listener {port} 127.0.0.1\n{user}password_file {users}\nlog_type error\n")
    with subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL) as child:
        wait_until(lambda: accepts(port))
        yield BrokerAddress("127.0.0.1", port)
        child.terminate()


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("s3cret:ü\nnot this line\n", encoding="utf-8")
    return path


def test_the_right_password_lets_us_in(guarded: BrokerAddress, password_file: Path) -> None:
    service = make_service()
    service.start()
    settings = MqttSettings(device="known", username="edge", password_file=password_file)
    bridge = MqttBridge(service, settings, guarded)
    bridge.start()
    wait_until(lambda: bridge.connected)
    bridge.stop()
    service.stop()


def test_a_wrong_password_is_reported_without_it(
    guarded: BrokerAddress, password_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    password_file.write_text("wrong-secret\n")
    service = make_service()
    service.start()
    bridge = MqttBridge(service, MqttSettings(device="unknown", username="edge", password_file=password_file), guarded)
    with caplog.at_level(logging.DEBUG):
        bridge.start()
        wait_until(lambda: "Not authorized" in caplog.text)
        bridge.stop()
    service.stop()
    assert not bridge.connected
    assert "wrong-secret" not in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe\n"])
def test_a_password_file_that_is_none_is_a_config_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    settings = MqttSettings(device="x", username="edge", password_file=path)
    with pytest.raises(ConfigError, match="password file") as caught:
        MqttBridge(make_service(), settings, BrokerAddress("127.0.0.1", 1))
    assert "first line is the password" in caught.value.hint
