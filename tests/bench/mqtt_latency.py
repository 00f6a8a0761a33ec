"""What MQTT adds to the service: first token, token stream and whole answer, p50 and p95, over a real mosquitto.

The engine is a fake that answers at a fixed pace, so that the difference is the front end's own. Run it with

    python -m tests.bench.mqtt_latency

It prints one JSON line for people and scripts. The service alone gets a prepared request; MQTT's side includes the
network, JSON, the template and tokenizing.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge.journal import Journal
from edge.mqtt import EmbeddedBroker, MqttBridge
from edge.openai import parse_chat, prepare
from edge.service import Delta, Event, Failed, Finished, Service
from edge.settings.mqtt import MqttSettings
from tests.edge.mqtt.client import Client, chat
from tests.fakes import FakeEngine, make_service

Sample = tuple[float, float, float]
"""Seconds from sending to the first token, from there to the last, and from sending to the end."""


def main() -> None:
    """Measure both ways in turns and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=2.0, help="pace of the fake engine")
    parser.add_argument("--journal", type=Path, help="keep requests in a folder, with its disk's fsync in the way")
    options = parser.parse_args()
    service = make_service(FakeEngine(lambda _: "x" * options.tokens, step_s=options.step_ms / 1000))
    service.start()
    with EmbeddedBroker(0) as broker:
        bridge = MqttBridge(service, MqttSettings(device="bench"), broker.address, Journal(options.journal))
        bridge.start()
        with Client(broker.address, "bench", "bench") as client:
            client._paho.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not bridge.connected:
                time.sleep(0.01)
            before = written()
            figures = measure(service, client, options.requests)
            figures["bytes_written_per_request"] = (written() - before) // options.requests
        bridge.stop()
    service.stop()
    print(json.dumps({"machine": platform.processor() or platform.machine(), **vars(options), **figures}, default=str))


def measure(service: Service, client: Client, number: int) -> dict[str, Any]:
    """Alternate, so that both see the same machine."""
    alone, over_mqtt = [], []
    for request in range(number):
        alone.append(ask_service(service))
        over_mqtt.append(ask_over_mqtt(client, f"r{request}"))
    return {
        "alone": summary(alone),
        "mqtt": summary(over_mqtt),
        "first_token_overhead_ms": round(_p50(over_mqtt, 0) - _p50(alone, 0), 3),
        "stream_overhead_percent": round(100 * (_p50(over_mqtt, 1) / _p50(alone, 1) - 1), 2),
        "total_overhead_percent": round(100 * (_p50(over_mqtt, 2) / _p50(alone, 2) - 1), 2),
    }


def ask_service(service: Service) -> Sample:
    """One request to the service itself."""
    (request,) = prepare(service.model, parse_chat(chat("go")["body"]))
    return _timed(lambda seen: service.submit(request, lambda event: seen(*_moment(event))))


def ask_over_mqtt(client: Client, request_id: str) -> Sample:
    """One streamed request over the broker."""
    done, tok = f"{client.branch}/{request_id}/done", f"{client.branch}/{request_id}/tok"

    def send(seen: Callable[[bool, bool], None]) -> None:
        client._paho.on_message = lambda _c, _d, message: seen(message.topic == tok, message.topic == done)
        topic = f"{client.device}/req/{client.name}/{request_id}"
        client._paho.publish(topic, json.dumps(chat("go", stream=True)), 1)

    return _timed(send)


def written() -> int:
    """Bytes that this process has sent to disks."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def summary(samples: list[Sample]) -> dict[str, float]:
    """Milliseconds."""
    names = {"first_token": 0, "stream": 1, "total": 2}
    return {
        f"{name}_p{percent}_ms": round(1000 * statistics.quantiles([s[i] for s in samples], n=100)[percent - 1], 3)
        for name, i in names.items()
        for percent in (50, 95)
    }


def _timed(send: Callable[[Callable[[bool, bool], None]], object]) -> Sample:
    """Time the tokens and the end, as the callback of ``send`` reports them."""
    tokens: list[float] = []
    ended = threading.Event()
    ended_at = 0.0

    def seen(is_token: bool, is_end: bool) -> None:
        nonlocal ended_at
        if is_token:
            tokens.append(time.perf_counter())
        if is_end:
            ended_at = time.perf_counter()
            ended.set()

    began = time.perf_counter()
    send(seen)
    assert ended.wait(60)
    return tokens[0] - began, tokens[-1] - tokens[0], ended_at - began


def _moment(event: Event) -> tuple[bool, bool]:
    return isinstance(event, Delta), isinstance(event, Finished | Failed)


def _p50(samples: list[Sample], i: int) -> float:
    """Milliseconds."""
    return 1000 * statistics.median(sample[i] for sample in samples)


if __name__ == "__main__":
    main()
