"""``qwedge mqtt ask`` as its users meet it: a process, its exit status, two streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge.mqtt import EmbeddedBroker
from tests.client.conftest import mqtt_url
from tests.edge.mqtt.conftest import MakeDevice, wait_until
from tests.edge.mqtt.fleet import Speed, fleet
from tests.fakes import MODEL_NAME, FakeEngine

pytestmark = pytest.mark.broker

ROOT = Path(__file__).parents[2]


def start(*args: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "edge.cli", "mqtt", "ask", *args]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QWEDGE_")}
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def run(*args: str) -> tuple[int, str, str]:
    return end(start(*args))


def test_a_device_answers(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device()
    target = ["--broker", mqtt_url(broker), "--device", device.name]
    named = ["hello", *target, "--json", "--id", "1", "--client", "me"]
    plain, stream = start("hello", *target), start("hello", *target, "--stream", "--max-tokens", "3")
    status, out, _ = run(*named)
    assert status == 0
    answer = json.loads(out)
    assert answer["choices"][0]["message"]["content"] == "You said: hello"
    assert end(plain) == (0, "You said: hello\n", "")
    assert end(stream) == (0, "You\n", "")
    status, again, _ = run(*named)
    assert (status, json.loads(again)) == (0, answer), "it was not run again"


def test_a_pool_answers(broker: EmbeddedBroker) -> None:
    with fleet(broker.address, [Speed(0.001)]):
        assert run("3", "--broker", mqtt_url(broker), "--pool", MODEL_NAME) == (0, "xxx\n", "")


def test_who_cannot_be_asked_is_said_at_once(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device, gone = make_device(), make_device()
    gone.bridge.stop()
    url = mqtt_url(broker)
    messages = {
        ("--device", "nobody"): "error: the device nobody is not known at this broker\n",
        ("--device", gone.name): f"error: the device {gone.name} is offline\n",
        ("--pool", "other-1b"): "error: no device that serves other-1b is online\n",
    }
    processes = [start("hello", "--broker", url, *args) for args in messages]
    for process, message in zip(processes, messages.values(), strict=True):
        status, out, err = end(process)
        assert (status, out) == (6, "")
        assert err.startswith(message)
        assert f"{device.name} ({MODEL_NAME})" in err, "the hint says who is there"
    status, _, err = run("hello", "--broker", "mqtt://127.0.0.1:9", "--timeout", "0.5")
    assert status == 6
    assert err.startswith("error: no connection to the MQTT broker 127.0.0.1:9: Connection refused\nhint: ")


def test_ctrl_c_cancels_the_request(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(lambda _: "z" * 4000, step_s=0.01))
    with start("hello", "--broker", mqtt_url(broker), "--device", device.name, "--stream") as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == "z"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    wait_until(lambda: device.service.stats().num_running == 0)
