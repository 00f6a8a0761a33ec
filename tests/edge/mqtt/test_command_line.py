"""The examples of README and docs/mqtt-protocol.md, with the mosquitto clients, as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from edge.mqtt import EmbeddedBroker
from edge.mqtt.messages import Accepted, Done, Info
from tests.edge.mqtt.client import check, text_of
from tests.edge.mqtt.conftest import MakeDevice
from tests.fakes import FakeEngine

pytestmark = pytest.mark.broker

SPECIFICATION = Path(__file__).parents[3] / "docs" / "mqtt-protocol.md"


def in_this_test(command: str, broker: EmbeddedBroker, device: str) -> str:
    """An example with this test's port and device in the places of its own."""
    return command.replace("-p 1883", f"-p {broker.address.port}").replace("dev/edge-1/", f"dev/{device}/")


def shell(command: str, broker: EmbeddedBroker, device: str, timeout_s: float = 30) -> str:
    """Run an example as printed; returns its output."""
    command = in_this_test(command, broker, device)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def examples() -> dict[str, str]:
    """The shell blocks of the specification by the name in the comment of their first line."""
    blocks = re.findall(r"```sh\n# (.+?)\n(.+?)```", SPECIFICATION.read_text(encoding="utf-8"), re.DOTALL)
    return dict(blocks)


@pytest.mark.parametrize("name", ["ask with MQTT 3.1.1", "ask with MQTT 5"])
def test_ask_and_stream(broker: EmbeddedBroker, make_device: MakeDevice, name: str) -> None:
    device = make_device()
    listen, ask = (in_this_test(line, broker, device.name) for line in examples()[name].strip().splitlines())
    with subprocess.Popen(["bash", "-c", f"exec stdbuf -oL {listen}"], stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        time.sleep(0.5)  # as a user does: first one terminal, then the other
        shell(ask, broker, device.name)
        messages = []
        while not messages or not messages[-1][0].endswith("/done"):
            messages.append(listener.stdout.readline().split(" ", 1))
        listener.terminate()
    values = [check(topic, payload.encode()) for topic, payload in messages]
    assert isinstance(values[0], Accepted)
    assert isinstance(values[-1], Done)
    text = "".join(json.loads(payload)["text"] for topic, payload in messages if topic.endswith("/tok"))
    assert text == text_of(values[-1]) == "You said: Name a colour."


def test_ask_in_bare_text(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    out = shell(examples()["ask in bare text"], broker, make_device().name)
    assert out == "You said: Name a colour.\n"


def test_ask_with_one_command(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    out = shell(examples()["ask with one command"], broker, make_device().name)
    assert text_of(Done.model_validate_json(out)) == "You said: Name a colour."


def test_look_at_a_device(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device()
    status, info = sorted(shell(examples()["look at a device"], broker, device.name).splitlines(), key=len)
    assert status.endswith("/status online")
    assert Info.model_validate_json(info.split(" ", 1)[1]).device == device.name


def test_cancel(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(lambda _: "x" * 4000, step_s=0.02))  # a minute and more, if nobody stops it
    client = device.client()
    command = examples()["cancel"].replace("/me/1", f"/{client.name}/1")
    client.send("1", {"body": {"messages": [{"role": "user", "content": "x"}]}})
    client.event("1", "started")
    shell(command, broker, device.name)
    assert client.done("1").status == 499
