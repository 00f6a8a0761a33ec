"""A system's mosquitto and its clients, with ``/etc/mosquitto`` as it is on a device.

Prints JSON about who could do what. Run in a namespace of its own, after the folders are mounted. A script, so that it
finds nothing but its own imports.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

CA = "/etc/mosquitto/certs/ca.pem"
REQUEST = "qwedge/v1/dev/edge/req/gateway"
WAIT_S = 60.0


class Session:
    """One client; ``tls``: over the network's listener."""

    def __init__(self, name: str, password: str, *, tls: bool, client_id: str = "") -> None:
        self.heard: list[str] = []
        self.reason = ""
        self._done = 0
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5)
        if name:
            self._client.username_pw_set(name, password)
        if tls:
            self._client.tls_set_context(ssl.create_default_context(cafile=CA))
        self._client.on_connect = self._on_connect
        self._client.on_message = lambda _client, _data, message: self.heard.append(
            f"{message.topic} {message.payload.decode()}"
        )
        self._client.on_publish = self._on_answer
        self._client.on_subscribe = self._on_answer
        self._client.connect("localhost" if tls else "127.0.0.1", 8883 if tls else 1883)
        self._client.loop_start()
        self._wait(lambda: self.reason != "")

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        self.reason = str(reason)

    def _on_answer(self, *_: Any) -> None:
        self._done += 1

    def _wait(self, condition: Any) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def subscribe(self, topic: str) -> None:
        before = self._done
        self._client.subscribe(topic, qos=1)
        self._wait(lambda: self._done > before)

    def publish(self, topic: str, payload: str) -> None:
        before = self._done
        self._client.publish(topic, payload, qos=1)
        self._wait(lambda: self._done > before)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def refused(name: str, password: str) -> str:
    session = Session(name, password, tls=True)
    session.close()
    return session.reason


def speaks_plain_mqtt(port: int) -> bool:
    """Whether a listener answers to a CONNECT without TLS."""
    connect = bytes.fromhex("100c00044d51545404020005") + b"\x00\x00"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as sock:
            sock.sendall(connect)
            return sock.recv(1) == b"\x20"
    except OSError:
        return False


def talk() -> dict[str, Any]:
    device = Session("qwedge-service", "device", tls=False)
    device.subscribe("qwedge/v1/dev/edge/#")
    gateway = Session("gateway", "secret", tls=True, client_id="hmi")
    gateway.subscribe("#")
    hmi = Session("hmi", "word", tls=True, client_id="gateway")
    gateway.publish(f"{REQUEST}/1", "mine")
    hmi.publish(f"{REQUEST}/2", "forged")
    device.publish("qwedge/v1/res/hmi/1/done", "not for gateway")
    device.publish("qwedge/v1/res/gateway/1/done", "forty-two")
    hmi.publish("qwedge/v1/dev/edge/req/hmi/1", "last")
    device._wait(lambda: any("last" in line for line in device.heard))
    gateway._wait(lambda: gateway.heard)
    for session in (device, gateway, hmi):
        session.close()
    return {"device": device.heard, "gateway": gateway.heard}


def main() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with subprocess.Popen(
        ["mosquitto", "-c", "/etc/mosquitto/mosquitto.conf"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as broker:
        try:
            deadline = time.monotonic() + WAIT_S
            while not speaks_plain_mqtt(1883):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            seen = talk() | {
                "anonymous": refused("", ""),
                "wrong": refused("gateway", "nonsense"),
                "plain": speaks_plain_mqtt(8883),
                "user": Path(f"/proc/{broker.pid}").stat().st_uid != os.geteuid(),
            }
        finally:
            broker.send_signal(signal.SIGTERM)
            log = broker.communicate(timeout=WAIT_S)[0]
    print(json.dumps(seen | {"log": log}))


if __name__ == "__main__":
    main()
