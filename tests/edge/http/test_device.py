"""What the device view is made from: figures of machine and service, the log, MQTT and its try-it form."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge.http.routes.device import DeviceSources
from edge.log_buffer import LogBuffer
from tests.edge.http.panel import device_with_mqtt
from tests.fakes import MODEL_NAME, FakeEngine
from tests.serving import Served, wait_for

Serve = Callable[..., Served]
SECRET = "the recipe of the sauce"


@pytest.fixture(scope="module")
def device() -> Iterator[Served]:
    with device_with_mqtt(FakeEngine()) as served:
        yield served


def test_the_document_tells_what_machine_and_service_do(serve: Serve) -> None:
    sources = DeviceSources(LogBuffer(), temperature_c=lambda: 51.5, power_w=lambda: 4.2, energy_j=lambda: 99.0)
    server = serve(FakeEngine(slots=3), app={"device": sources})
    before = server.client.get("/v1/device").json()
    assert before["model"]["id"] == MODEL_NAME
    assert before["provider"] == {"name": "cpu", "reason": "the bundle was made for it"}
    assert before["queue"] == {"waiting": 0, "running": 0, "slots": 3, "max_waiting": 8, "accepting": True}
    assert (before["temperature_c"], before["power_w"], before["energy_j"]) == (51.5, 4.2, 99.0)
    assert 0 < before["host"]["ram_available_bytes"] <= before["host"]["ram_total_bytes"]
    assert before["process"]["rss_bytes"] > 1 << 20
    assert before["uptime_s"] >= 0
    assert before["slots"] == []
    assert before["ttft_ms"] is before["cache_hit_ratio"] is before["mqtt"] is None
    body = {"messages": [{"role": "user", "content": SECRET}]}
    answer = server.client.post("/v1/chat/completions", json=body).json()
    after = server.client.get("/v1/device")
    assert after.json()["output_tokens"] == answer["usage"]["completion_tokens"]
    assert after.json()["ttft_ms"] >= 0
    assert after.json()["cache_hit_ratio"] == 0
    assert SECRET not in after.text


def test_busy_slots_are_told_while_they_work(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: "x" * 3000, slots=1, step_s=0.01))
    with server.asking(), server.asking():
        wait_for(lambda: server.client.get("/v1/device").json()["tokens_per_second"] > 0)
        server.engine.gate.clear()
        wait_for(lambda: server.service.stats().num_waiting == 1)
        busy = server.client.get("/v1/device").json()
        server.engine.step_s = 0
        server.engine.gate.set()
        (slot,) = busy["slots"]
        assert (slot["slot"], slot["status"]) == (0, "decode")
        assert slot["num_output_tokens"] > 1
        assert 0 < slot["tokens_per_s"] <= 100  # a step takes 10 ms at least
        assert busy["queue"]["waiting"] == 1
        assert busy["output_tokens"] >= slot["num_output_tokens"]


def test_the_log_from_a_line_and_a_level_on(serve: Serve) -> None:
    logs = LogBuffer()
    server = serve(app={"device": DeviceSources(logs)})
    for level in (logging.INFO, logging.WARNING):
        logs.handle(logging.LogRecord("edge.x", level, "", 0, "text %d", (level,), None))
    lines = server.client.get("/v1/logs").json()["lines"]
    assert [(line["number"], line["level"], line["message"]) for line in lines] == [
        (1, "INFO", "text 20"),
        (2, "WARNING", "text 30"),
    ]
    assert server.client.get("/v1/logs?after=1").json()["lines"] == lines[1:]
    assert server.client.get("/v1/logs?level=warning").json()["lines"] == lines[1:]
    for query in ("after=x", "after=-1", "after=" + "9" * 30, "level=loud"):
        response = server.client.get(f"/v1/logs?{query}")
        assert response.status_code == 400
        assert response.json()["error"]["param"] == query.partition("=")[0]


def test_without_mqtt_it_is_said_what_to_do(serve: Serve) -> None:
    server = serve()
    for response in (server.client.get("/v1/mqtt"), server.client.post("/v1/mqtt/try", json={})):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "mqtt_off"
        assert "--broker" in response.json()["error"]["hint"]


@pytest.mark.broker
def test_a_question_through_the_real_broker(device: Served) -> None:
    body = {"messages": [{"role": "user", "content": SECRET}]}
    events = _try(device, body)
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "progress"
    assert kinds[-1] == "end"
    text = "".join(event["text"] for event in events if event["kind"] == "text")
    assert text == f"You said: {SECRET}" == events[-1]["answer"]["choices"][0]["message"]["content"]


@pytest.mark.broker
def test_messages_are_told_without_their_texts(device: Served) -> None:
    _try(device, {"messages": [{"role": "user", "content": SECRET}]})
    response = device.client.get("/v1/mqtt")
    assert SECRET not in response.text
    state = response.json()
    assert (state["state"], state["device"], state["root"]) == ("connected", "edge-7", "qwedge")
    assert state["broker"].startswith("mqtt://127.0.0.1:")
    assert state["requests"] >= 1
    seen = {(message["direction"], message["kind"]) for message in state["messages"]}
    assert {("in", "req"), ("out", "done"), ("out", "evt"), ("out", "status"), ("out", "info")} <= seen
    numbers = [message["number"] for message in state["messages"]]
    assert numbers == sorted(numbers)
    assert all(message["bytes"] > 0 for message in state["messages"])
    document = device.client.get("/v1/device").json()
    assert (document["name"], document["mqtt"]["state"]) == ("edge-7", "connected")


@pytest.mark.broker
def test_one_try_at_a_time_and_what_is_wrong_is_said_before(device: Served) -> None:
    response = device.client.post("/v1/mqtt/try", json={"messages": []})
    assert response.status_code == 400
    body = {"messages": [{"role": "user", "content": "x"}]}
    device.engine.gate.clear()
    try:
        with device.client.stream("POST", "/v1/mqtt/try", json=body) as first:
            lines = first.iter_lines()
            next(lines)
            second = device.client.post("/v1/mqtt/try", json=body)
            assert second.status_code == 429
            device.engine.gate.set()
            assert "data: [DONE]" in list(lines)
    finally:
        device.engine.gate.set()


@pytest.mark.broker
def test_leaving_a_try_cancels_its_request() -> None:
    with device_with_mqtt(FakeEngine(reply=lambda _: "word " * 700, step_s=0.01)) as device:
        body = {"messages": [{"role": "user", "content": "x"}]}
        with device.client.stream("POST", "/v1/mqtt/try", json=body) as response:
            next(line for line in response.iter_lines() if '"text"' in line)
        wait_for(lambda: device.service.stats().num_running == 0)


def _try(device: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = device.client.post("/v1/mqtt/try", json=body)
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
