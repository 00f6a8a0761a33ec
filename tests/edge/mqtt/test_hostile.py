"""Hostile payloads: each gets one outcome or none, and the device answers the next honest request as before."""

from __future__ import annotations

import json
import random

import pytest

from tests.edge.mqtt.client import chat, text_of
from tests.edge.mqtt.conftest import MakeDevice, wait_until
from tests.fakes import FakeEngine

pytestmark = pytest.mark.broker

VALID = json.dumps(chat("hello", stream=True, deadline_ms=60_000)).encode()
WRITTEN = {
    "deep-array": b'{"body":' + b"[" * 200_000,
    "deep-object": b'{"body":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "huge-integer": b'{"body":{"messages":[{"role":"user","content":"x"}],"max_tokens":' + b"9" * 100_000 + b"}}",
    "infinity": b'{"body":{"messages":[{"role":"user","content":"x"}],"temperature":1e400}}',
    "not-a-number": b'{"body":{"messages":[{"role":"user","content":"x"}],"temperature":NaN}}',
    "surrogate": b'{"body":{"messages":[{"role":"user","content":"\\ud800"}]}}',
    "no-utf8": b'{"body":{"messages":[{"role":"user","content":"\xff"}]}}',
    "zeros": bytes(1000),
    "binary": b"a\0b" * 100,
    "same-key": b'{"body":' + b",".join([b'"body":{}'] * 10_000) + b"}",
    "many-messages": json.dumps({"body": {"messages": [{"role": "user", "content": "x"}] * 20_000}}).encode(),
    "wrong-types": b'{"v":"1","body":[],"stream":"yes","deadline_ms":1e99,"attempt":-1}',
    "log-injection": b'{"body":{"messages":[{"role":"x\\r\\nERROR forged","content":"x"}]}}',
    "mebibyte-of-braces": b"{" * (1 << 20),
    "too-large": b"{" * ((1 << 20) + 1),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_written_attack_gets_one_error(make_device: MakeDevice, name: str, caplog: pytest.LogCaptureFixture) -> None:
    client = make_device().client()
    client.send(name, WRITTEN[name])
    done = client.done(name)
    assert done.status in {400, 413}
    client.send("honest", chat("still there?"))
    assert text_of(client.done("honest")) == "You said: still there?"
    assert len(client.of(name, "done")) == 1
    assert not [record for record in caplog.records if record.exc_info]


def test_a_packet_that_only_the_broker_sees_harms_nobody(make_device: MakeDevice) -> None:
    device = make_device()
    sender, client = device.client(), device.client()
    sender._paho.publish(f"{sender.device}/req/{sender.name}/1", bytes(6 << 20), 1)
    client.send("honest", chat("x"))
    assert client.done("honest").status == 200
    assert device.bridge.connected


def test_hundreds_of_mutated_requests_get_one_outcome_each(make_device: MakeDevice) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    device = make_device(FakeEngine(slots=4), max_queue=64)
    client = device.client()
    for number in range(300):
        client.send(f"m{number}", _mutate(source, number))
    for number in range(300):
        assert client.done(f"m{number}").status in {200, 400, 404, 408, 429}
    wait_until(lambda: device.bridge.stats().num_running == 0)
    client.send("honest", chat("x"))
    assert client.done("honest").status == 200
    assert all(len(client.of(f"m{number}", "done")) == 1 for number in range(300))


def test_hundreds_of_foreign_topics_are_ignored(make_device: MakeDevice) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    device = make_device()
    client = device.client()
    for _ in range(300):
        verb = source.choice(["req", "cancel"])
        levels = [_level(source) for _ in range(2)]
        levels[source.randrange(2)] += source.choice([" ", "ü", "$", "~", "x" * 65])
        client.publish(f"{client.device}/{verb}/{levels[0]}/{levels[1]}", source.randbytes(20))
    client.send("honest", chat("x"))
    assert client.done("honest").status == 200
    assert device.bridge.stats().num_requests == 1


def _mutate(source: random.Random, number: int) -> bytes:
    """Random bytes, or a valid request of its own with a few bytes changed, cut or doubled."""
    if source.random() < 0.2:
        return source.randbytes(source.randrange(1, 500))
    payload = bytearray(VALID.replace(b"hello", f"hello {number}".encode()))
    for _ in range(source.randrange(1, 6)):
        at = source.randrange(len(payload))
        match source.randrange(4):
            case 0:
                payload[at] = source.randrange(256)
            case 1:
                del payload[at:]
                payload += b"}"
            case 2:
                payload[at:at] = source.choice([b"{", b"]", b'"', b"\\", b"1e999", b"null", b"\x00", b"[" * 500])
            case _:
                payload[at:at] = payload[at : at + source.randrange(20)]
    return bytes(payload)


def _level(source: random.Random) -> str:
    return "".join(source.choices("abcXYZ019._-", k=source.randrange(1, 20)))
