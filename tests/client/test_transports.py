"""What can go wrong on the way: lost links, lost answers, killed brokers, servers that break off."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import edge.client.mqtt
from edge.client import AnswerChangedError, Client
from edge.client.mqtt import MqttTransport
from edge.errors import ConflictError, UnavailableError
from edge.mqtt import EmbeddedBroker
from edge.mqtt.messages import parse_request
from tests.client.conftest import mqtt_url
from tests.edge.mqtt import client as requester
from tests.edge.mqtt.conftest import MakeDevice, wait_until
from tests.edge.mqtt.proxy import Proxy, Treatment
from tests.fakes import FakeEngine

pytestmark = pytest.mark.broker


@pytest.fixture
def own_broker() -> Iterator[EmbeddedBroker]:
    """A broker that the test may kill."""
    with EmbeddedBroker(0) as broker:
        yield broker


def link_of(client: Client) -> socket.socket:
    assert isinstance(client._transport, MqttTransport)
    link = client._transport.connection.socket()
    assert link is not None
    return link


@pytest.mark.parametrize(("treatment", "hint"), [("unauthorized", "check the user name"), ("garbage", "is a broker")])
def test_who_is_not_let_in_hears_why(broker: EmbeddedBroker, treatment: Treatment, hint: str) -> None:
    with Proxy(broker.address, treatment) as proxy:
        client = Client(mqtt_url(proxy), device="any", connect_timeout_s=1.0)
        with pytest.raises(UnavailableError) as refusal, client:
            client.check()
        assert refusal.value.hint.startswith(hint)
        assert not [thread for thread in threading.enumerate() if thread.name == "mqtt-network"], "it has given up"


def test_an_old_broker_is_spoken_to_in_mqtt_3(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(lambda _: "one two three", step_s=0.002))
    with Proxy(broker.address, "refuse") as old:
        url = f"mqtt://127.0.0.1:{old.address.port}"
        with Client(url, device=device.name, timeout_s=60) as client:
            assert isinstance(client._transport, MqttTransport)
            assert client._transport.connection.protocol == "3.1.1"
            assert client.ask("x") == "".join(client.stream("x")) == "one two three"


def test_small_packets_are_not_delayed(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    with Client(mqtt_url(broker), device=make_device().name) as client:
        client.ask("x")
        assert link_of(client).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_id_that_is_kept_brings_the_answer_again(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device()
    for _ in range(2):  # as after a restart of the program
        with Client(mqtt_url(broker), client="press-7", device=device.name, timeout_s=60) as client:
            assert client.ask("x", id="order-1") == "You said: x"
            steps = device.engine.num_steps
            assert "".join(client.stream("x", id="order-1")) == "You said: x"
            assert device.engine.num_steps == steps, "it was not run again"
            with pytest.raises(ConflictError):
                client.ask("y", id="order-1")


def test_two_requests_at_once_need_two_ids(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(lambda _: "z" * 400, step_s=0.005))
    with Client(mqtt_url(broker), device=device.name, timeout_s=60) as client:
        for _ in client.stream("x", id="1"):
            with pytest.raises(ConflictError):
                client.ask("x", id="1")
            break


def test_an_answer_that_was_given_while_the_link_was_down_is_asked_for(
    broker: EmbeddedBroker, make_device: MakeDevice
) -> None:
    device = make_device()
    device.engine.gate.clear()
    with ThreadPoolExecutor() as threads, Client(mqtt_url(broker), device=device.name, timeout_s=60) as client:
        answer = threads.submit(client.ask, "x")
        wait_until(lambda: device.service.stats().num_running == 1)
        link_of(client).shutdown(socket.SHUT_RDWR)
        device.engine.gate.set()
        assert answer.result() == "You said: x"
    assert device.bridge.stats().num_requests == 2


def test_a_stream_goes_on_over_a_lost_link(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 6
    device = make_device(FakeEngine(lambda _: text, step_s=0.004))
    with Client(mqtt_url(broker), device=device.name, timeout_s=60) as client:
        pieces = []
        for piece in client.stream("x"):
            if not pieces:
                link_of(client).shutdown(socket.SHUT_RDWR)
            pieces.append(piece)
    assert "".join(pieces) == text


def test_a_killed_broker_loses_nothing(own_broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(slots=4, step_s=0.01), address=own_broker.address)
    with (
        ThreadPoolExecutor() as threads,
        Client(mqtt_url(own_broker), device=device.name, timeout_s=60) as client,
    ):
        answers = [threads.submit(client.ask, f"n{i}") for i in range(4)]
        wait_until(lambda: device.service.stats().num_running > 0)
        assert own_broker.pid is not None
        os.kill(own_broker.pid, signal.SIGKILL)
        assert [answer.result() for answer in answers] == [f"You said: n{i}" for i in range(4)]


def test_copies_count_their_attempts_and_say_how_long_an_answer_is_of_use(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge.client.mqtt, "FIRST_WORD_S", (0.1, 0.2))
    topic = "qwedge/v1/dev/ghost/req/press-7/1"
    with requester.Client(broker.address, "listener", "ghost", extra=(topic,)) as listener:
        with (
            ThreadPoolExecutor() as threads,
            Client(mqtt_url(broker), client="press-7", device="ghost", timeout_s=60) as client,
        ):
            answer = threads.submit(client.ask, "x", id="1", temperature=0)
            listener.wait(lambda: len(listener.received) >= 3)
            done = {"v": 1, "id": "1", "status": 200, "body": {"choices": [{"text": "boo"}]}, "surprise": 1}
            listener.publish("qwedge/v1/res/press-7/1/done", json.dumps(done).encode())
            assert answer.result() == "boo", "fields of later versions are no obstacle"
        copies = [parse_request(message.payload) for message in listener.received if message.topic == topic]
    assert [copy.attempt for copy in copies] == list(range(1, len(copies) + 1))
    assert all(0 < (copy.deadline_ms or 0) <= 60000 for copy in copies)
    assert copies[0].body == {"messages": [{"role": "user", "content": "x"}], "temperature": 0}


def test_nonsense_on_the_own_branch_does_no_harm(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device()
    device.engine.gate.clear()
    with (
        ThreadPoolExecutor() as threads,
        Client(mqtt_url(broker), client="victim", device=device.name, timeout_s=60) as client,
        requester.Client(broker.address, "attacker", device.name) as attacker,
    ):
        answer = threads.submit(client.ask, "x", id="1")
        wait_until(lambda: device.service.stats().num_running == 1)
        for kind in ("evt", "tok", "done", "done/text", "other"):
            for payload in (b"", b"\xff", b"{", b"[]", b"{}", b'{"status":"x","body":1}', b'{"seq":"a","text":1}'):
                attacker.publish(f"qwedge/v1/res/victim/1/{kind}", payload)
        device.engine.gate.set()
        assert answer.result() == "You said: x"


class BreakingServer:
    """An HTTP server that ends its first connection in the middle of a stream; the next ones get the whole text."""

    def __init__(self, first: list[str], then: list[str]) -> None:
        self._replies = [(first, False), (then, True)]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._thread.join(60)
        self._listener.close()

    def _run(self) -> None:
        self._listener.accept()[0].close()  # the client looks whether somebody is there
        for pieces, whole in self._replies:
            link, _ = self._listener.accept()
            with link, link.makefile("rb") as request:
                size = 0
                while (line := request.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        size = int(line.split()[1])
                request.read(size)
                link.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
                for piece in pieces:
                    chunk = {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
                    link.sendall(f"data: {json.dumps(chunk)}\n\n".encode())
                if whole:
                    link.sendall(b"data: [DONE]\n\n")


def test_a_stream_that_breaks_off_is_asked_for_again() -> None:
    server = BreakingServer(["The ", "quick "], ["The", " quick brown", " fox"])
    with Client(server.url, timeout_s=60) as client:
        pieces = list(client.stream("x"))
    server.close()
    assert pieces == ["The ", "quick ", "brown fox"]


def test_a_stream_that_breaks_off_and_then_reads_differently_is_an_error() -> None:
    server = BreakingServer(["red"], ["blue"])
    with Client(server.url, timeout_s=60) as client:
        stream = client.stream("x")
        with pytest.raises(AnswerChangedError):
            list(stream)
    server.close()
    assert stream.answer is not None
    assert stream.answer["choices"][0]["message"]["content"] == "blue"


def test_a_user_asks_under_the_own_name(broker: EmbeddedBroker, make_device: MakeDevice) -> None:
    device = make_device()
    topic = f"qwedge/v1/dev/{device.name}/req/+/+"
    with requester.Client(broker.address, "listener", device.name, extra=(topic,)) as listener:
        clients = [Client(mqtt_url(broker), device=device.name, username="press-7", timeout_s=60) for _ in range(2)]
        with clients[0] as one, clients[1] as two:
            assert one.ask("x", id="1") == two.ask("x", id="2") == "You said: x", "they do not push each other out"
        asked = {message.topic for message in listener.received if "/req/" in message.topic}
    assert asked == {f"qwedge/v1/dev/{device.name}/req/press-7/{number}" for number in (1, 2)}
