"""Hostile payloads: each gets one outcome or none, and the device answers the next honest request as before."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import psutil
import pytest

from edge.mqtt.packets import Incoming, Outgoing
from tests.edge.mqtt.client import chat, check, text_of
from tests.edge.mqtt.conftest import Device, MakeDevice, wait_until
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


NUM_MALFORMED = 20_000
BURST = 200
"""Messages at once: fewer than the inbox holds, so that each is looked at."""
MAX_GROWTH_BYTES = 100 << 20


def test_twenty_thousand_malformed_messages_get_one_outcome_each_or_none(
    make_device: MakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Put in behind the network and taken out before it: a broker would only slow this down."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    device = make_device(FakeEngine(slots=4, reply=lambda _prompt: "ok"), max_queue=256)
    client = device.client()
    outcomes: Counter[str] = Counter()

    def record(message: Outgoing) -> object:
        if message.topic.endswith(("/done", "/mine")):
            check("x/done", message.payload)
        outcomes[message.topic] += message.topic.rsplit("/", 1)[-1] in {"done", "mine"}
        return lambda: True

    with monkeypatch.context() as patched, caplog.at_level("ERROR"):
        patched.setattr(device.bridge._connection, "track", record)
        wanted, acks = Counter[str](), Counter[int]()
        for number in range(NUM_MALFORMED):
            message, topic = _malformed(source, device, number)
            wanted[topic] += 1
            device.bridge._receive(replace(message, ack=lambda number=number: acks.update([number])))
            if number % BURST == BURST - 1:
                wait_until(lambda done=number + 1: len(acks) == done)
            if number == NUM_MALFORMED // 10:
                before = psutil.Process().memory_info().rss
        wait_until(lambda: device.bridge.stats().num_running == 0)
        del wanted[""]
        wait_until(lambda: +outcomes == wanted)
        assert set(acks.values()) == {1}
        assert psutil.Process().memory_info().rss - before < MAX_GROWTH_BYTES
        assert not [record for record in caplog.records if record.exc_info]
    client.send("honest", chat("still there?"))
    assert text_of(client.done("honest")) == "ok"


def _malformed(  # noqa: PLR0911 - one line for each way to be wrong
    source: random.Random, device: Device, number: int
) -> tuple[Incoming, str]:
    """A message that is wrong somewhere, and the topic of its outcome; empty where it has none."""
    request = f"qwedge/v1/dev/{device.name}/req/c{number % 50}/m{number}"
    branch = f"qwedge/v1/res/c{number % 50}"
    done = f"{branch}/m{number}/done"
    message = Incoming(request, _mutate(source, number), retain=False)
    match source.randrange(20):
        case 0:  # under no name that could be answered
            last = source.choice(["", "ü", "a b", "x" * 65, "a\x00b", "#", "+", "\ud800"])
            return replace(message, topic=f"{request}{last}" if last else f"{request}/"), ""
        case 1:  # none of the protocol's topics
            tail = source.choice(["req", "req/c", "cancel", "info", "status", "cmd/x/y", "rule/x/error", "../req/c/1"])
            return replace(message, topic=f"qwedge/v1/dev/{device.name}/{tail}"), ""
        case 2:
            return replace(message, topic=request.replace("/req/", "/cancel/")), ""
        case 3:
            return replace(message, retain=True), ""
        case 4:
            hostile = [
                "$SYS/x",
                "#",
                "qwedge/v1/res/other/x",
                f"{branch}/+",
                f"{branch}x/y",
                "",
                f"{branch}/{'x' * 2000}",
            ]
            return replace(message, response_topic=source.choice(hostile)), done
        case 5:
            own = f"{branch}/m{number}/mine"
            return replace(message, response_topic=own, correlation=source.randbytes(source.randrange(200))), own
        case 6:
            return replace(message, payload=None), done
        case 7:
            return replace(message, expiry_s=source.choice([0, 1, 2**32 - 1])), done
        case 8:
            return replace(message, redelivered=True), done
        case _:
            return message, done


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
