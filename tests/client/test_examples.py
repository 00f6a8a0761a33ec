"""The examples of docs/clients.md and docs/examples, run as they stand, and the flow for Node-RED."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.mqtt import EmbeddedBroker, MqttBridge
from edge.mqtt.packets import Incoming
from edge.mqtt.payload import read
from edge.mqtt.topics import Layout, RequestTopic
from edge.settings.mqtt import MqttSettings
from tests.edge.mqtt.conftest import MakeDevice, wait_until
from tests.fakes import MODEL_NAME, FakeEngine, make_service

pytestmark = pytest.mark.broker

DOCS = Path(__file__).parents[2] / "docs"
STORY = "Once upon a time."


def blocks(language: str, page: str = "clients.md") -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.+?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def reply(prompt: str) -> str:
    answers = {"tomato": "yes", "story": STORY, "metal": "iron"}
    return next((answer for word, answer in answers.items() if word in prompt), "blue")


@pytest.fixture
def here(broker: EmbeddedBroker, make_device: MakeDevice) -> Callable[[str], str]:
    """Puts this test's broker and device into an example."""
    device = make_device(FakeEngine(reply, slots=4))
    places = {"127.0.0.1:1883": f"127.0.0.1:{broker.address.port}", "-p 1883": f"-p {broker.address.port}",
              "1883, ": f"{broker.address.port}, ", "edge-1": device.name}  # fmt: skip

    def put(example: str) -> str:
        for place, own in places.items():
            example = example.replace(place, own)
        return example

    return put


def python(source: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source, *args],
        cwd=DOCS.parent, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_examples(here: Callable[[str], str]) -> None:
    blocking, asynchronous, paho = (here(block) for block in blocks("python"))
    out = python(blocking)
    assert out.startswith(f"blue\n{STORY}yes ")
    assert int(out.rsplit(" ", 1)[1]) > 0
    assert python(asynchronous) == f"['blue', 'iron']\n{STORY}"
    assert "edge.client" not in paho
    assert python(paho, "Name a colour.") == "blue\n"


def test_the_shell_examples(here: Callable[[str], str]) -> None:
    ask, listen, publish = (here(block) for block in blocks("sh"))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def shell(command: str) -> str:
        return subprocess.run(
            ["bash", "-ec", command], env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout  # fmt: skip

    assert shell(ask.splitlines()[0]) == "blue\n"
    listener = subprocess.Popen(["bash", "-c", f"exec stdbuf -oL {listen.splitlines()[1]} -W 60"],
                                stdout=subprocess.PIPE, text=True)  # fmt: skip
    with listener:
        assert listener.stdout is not None
        shell(publish)
        while not select.select([listener.stdout], [], [], 0.2)[0]:  # the listener is not there yet
            shell(publish)
        shell(publish)
        text = next((line for line in listener.stdout if "/done/text " in line), "nothing")
        listener.terminate()
    assert text.endswith(" blue\n")


def test_the_example_of_the_pool(broker: EmbeddedBroker) -> None:
    [example] = [block for block in blocks("sh", "mqtt-protocol.md") if block.startswith("# ask the pool\n")]
    service = make_service(FakeEngine(reply))
    bridge = MqttBridge(service, MqttSettings(root="examples", device="d", pool="on"), broker.address)
    service.start()
    bridge.start()
    try:
        wait_until(lambda: bridge.connected and bridge.pool_member)
        example = example.replace("-p 1883", f"-p {broker.address.port}").replace("qwedge/v1", "examples/v1")
        line = ["bash", "-c", example.replace("qwen2.5-coder-0.5b-instruct", MODEL_NAME)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    finally:
        service.stop()
        bridge.stop()
    assert json.loads(done.stdout)["body"]["choices"][0]["message"]["content"] == "blue"


def test_the_flow_for_node_red_can_be_imported() -> None:
    flow: list[dict[str, Any]] = json.loads((DOCS / "examples" / "node-red.json").read_text(encoding="utf-8"))
    by_id = {node["id"]: node for node in flow}
    assert len(by_id) == len(flow)
    [tab] = [node["id"] for node in flow if node["type"] == "tab"]
    for node in flow:
        if node["type"] in {"tab", "mqtt-broker"}:
            continue
        assert node["z"] == tab
        outputs = node["wires"]
        assert all(target in by_id for wires in outputs for target in wires)
        assert len(outputs) == node.get("outputs", len(outputs))
        if node["type"].startswith("mqtt"):
            assert by_id[node["broker"]]["type"] == "mqtt-broker"
    assert {node["type"] for node in flow} <= {
        "tab", "mqtt-broker", "mqtt in", "mqtt out", "inject", "function", "debug"
    }  # fmt: skip


def test_the_flow_for_node_red_sends_what_a_device_takes() -> None:
    flow = json.loads((DOCS / "examples" / "node-red.json").read_text(encoding="utf-8"))
    [ask] = [node["func"] for node in flow if node.get("name") == "ask"]
    topic, client = re.search(r"topic: `(.+)`", ask), re.search(r"/req/(.+?)/", ask)
    assert topic is not None
    assert client is not None
    assert Layout("qwedge", "edge-1").parse(
        topic[1].replace("${target}", "dev/edge-1").replace("${id}", "1")
    ) == RequestTopic(Layout("qwedge", "edge-1").parse(f"qwedge/v1/dev/edge-1/req/{client[1]}/1").request)
    payload = re.search(r"payload: (\{.+?\n    \})", ask, re.DOTALL)
    assert payload is not None
    as_json = re.sub(r"(\w+):", r'"\1":', payload[1].replace("String(msg.payload)", '"hi"'))
    request = json.loads(re.sub(r",(\s*\})", r"\1", as_json))
    wanted = read(Incoming("t", json.dumps(request).encode(), retain=False), chat=True)
    assert wanted.body["messages"] == [{"role": "user", "content": "hi"}]
    assert wanted.stream
    [answers] = [node["topic"] for node in flow if node["type"] == "mqtt in"]
    assert answers == f"qwedge/v1/res/{client[1]}/#"


def test_the_sketch_uses_the_topics_of_the_protocol() -> None:
    sketch = (DOCS / "examples" / "esp32.ino").read_text(encoding="utf-8")
    for part in ('"qwedge/v1/"', '"/req/"', '"qwedge/v1/res/"', '"+/done/text"', '"+/done/error"', '"dev/edge-1"'):
        assert part in sketch
