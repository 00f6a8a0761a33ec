"""Requests that outlive the device's process, and disks that refuse them: over a real mosquitto."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edge.journal
from edge.journal import Entry, Journal
from edge.journal_file import JournalFile
from edge.mqtt import EmbeddedBroker, MqttBridge
from edge.mqtt.acknowledging import Acknowledgements
from edge.mqtt.ledger import Job, Reply
from edge.mqtt.messages import Done
from edge.mqtt.packets import Incoming
from edge.mqtt.stored import pack
from edge.mqtt.topics import Layout, RequestId
from edge.settings.mqtt import MqttSettings
from tests.edge.journals import settled
from tests.edge.mqtt.client import Client, chat, text_of
from tests.edge.mqtt.conftest import Device, wait_until
from tests.fakes import FakeEngine, make_service
from tests.faults.runtime import POISON, runtime

pytestmark = pytest.mark.broker

NAME = "durable"
StartDevice = Callable[..., Device]
Leave = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def client(broker: EmbeddedBroker) -> Iterator[Client]:
    """Listens before there is a device."""
    with Client(broker.address, "patient", NAME) as client:
        yield client


@pytest.fixture
def start(broker: EmbeddedBroker, folder: Path, client: Client) -> Iterator[StartDevice]:
    """Start the device; its journal is always the same. Everything ends with the test."""
    with ExitStack() as stack:

        def make(engine: FakeEngine | None = None, *, problem: str | None = None) -> Device:
            engine = engine or FakeEngine()
            service = make_service(engine)
            settings = MqttSettings(device=NAME, keepalive_s=5, pool="off")
            bridge = MqttBridge(service, settings, broker.address, Journal(folder), problem=problem)
            service.start()
            bridge.start()
            device = Device(engine, service, bridge, NAME, lambda: client)
            stack.callback(stop, device)
            wait_until(lambda: bridge.connected)
            return device

        yield make


def stop(device: Device) -> None:
    device.engine.gate.set()
    device.service.stop()
    device.bridge.stop()


@pytest.fixture
def leave(folder: Path) -> Leave:
    """Make the journal look as a crash leaves it."""

    def make(*entries: Entry, outcome: bytes | None = None) -> None:
        journal = Journal(folder)
        journal.open()
        for entry in entries:
            assert settled(journal.accept, entry) is None
            if outcome is not None:
                assert settled(journal.settle, entry.key, entry.reply, outcome) is None
        journal.close()

    return make


class Disk:
    """What the disk does with commits."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        """What it refuses them with."""
        self.works = threading.Event()
        """Cleared, they hang until it is set again."""
        self.works.set()


def stored(request_id: str, text: str, *, starts: int = 1) -> Entry:
    """A request as the device stores it."""
    layout, request = Layout("qwedge", NAME), RequestId("patient", request_id)
    job = Job(request, b"fingerprint", Reply(request_id, layout.reply(request), plain=False), stream=False)
    message = Incoming(layout.request(request), json.dumps(chat(text)).encode(), retain=False)
    return replace(pack(job, message), starts=starts)


@pytest.fixture
def begin(broker: EmbeddedBroker, folder: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start the device in a process of its own, and end the one before by SIGKILL."""
    with ExitStack() as stack:

        def make() -> subprocess.Popen[str]:
            stack.close()
            return stack.enter_context(runtime(broker.address.port, NAME, folder, folder.parent / "log", step_ms=5))

        yield make


Begin = Callable[[], subprocess.Popen[str]]


# --- a process that ends ----------------------------------------------------------------------------------------------


def test_an_accepted_request_is_answered_by_the_next_process(begin: Begin, client: Client) -> None:
    begin()
    inbox = f"{client.branch}/my/inbox"
    client.send("1", chat("x" * 400, stream=True), ResponseTopic=inbox, CorrelationData=b"key")
    client.send("2", b"x" * 400)
    client.wait(lambda: any(message.topic == f"{inbox}/evt" for message in client.received))
    client.event("2", "accepted")
    begin()
    assert text_of(client.done("2")).endswith("x" * 400)
    client.wait(lambda: client.of("2", "done/text") == [text_of(client.done("2")).encode()])
    client.wait(lambda: any(message.topic == inbox for message in client.received))
    (done,) = [message for message in client.received if message.topic == inbox]
    assert done.correlation == b"key"
    client.send("2", b"x" * 400)
    again = client.done("2", 2)
    assert (again.replayed, again.body) == (True, client.done("2").body)


def test_an_answer_outlives_the_process(begin: Begin, client: Client) -> None:
    begin()
    client.send("1", chat("x"))
    first = client.done("1")
    begin()
    client.send("1", chat("x", attempt=2))
    client.wait(lambda: any(done.replayed for done in client.of("1", "done")))
    assert {text_of(done) for done in client.of("1", "done")} == {text_of(first)}
    client.send("1", chat("something else"))
    client.wait(lambda: client.of("1", "done")[-1].status == 409)


def test_a_request_that_ends_the_process_gets_an_error_and_takes_no_other_with_it(begin: Begin, client: Client) -> None:
    process, deaths = begin(), 0
    client.send("innocent", chat("x" * 400))
    client.event("innocent", "accepted")
    client.send("poison", chat(POISON))
    while not client.of("poison", "done"):
        if process.poll() is not None:
            deaths += 1
            process = begin()
        time.sleep(0.02)
    done = client.done("poison")
    assert (done.status, done.body["error"]["code"]) == (500, "crashed")
    assert 2 <= deaths <= 3
    assert client.done("innocent").status == 200
    client.send("poison", chat(POISON))
    assert client.done("poison", 2).replayed
    client.send("3", chat("y"))
    assert client.done("3").status == 200


def test_a_deadline_goes_on_while_the_device_is_away(begin: Begin, client: Client) -> None:
    process = begin()
    client.send("1", chat("x" * 1000, deadline_ms=1000))
    client.event("1", "accepted")
    process.kill()
    time.sleep(1)
    begin()
    assert client.done("1").status == 408


# --- what a crash leaves ----------------------------------------------------------------------------------------------


def test_an_outcome_that_may_not_have_arrived_is_published_again(
    start: StartDevice, leave: Leave, client: Client
) -> None:
    done = Done(id="1", status=200, body={"choices": [{"message": {"content": "stored"}}]})
    leave(stored("1", "x"), outcome=done.encode())
    device = start()
    assert client.done("1") == done
    assert device.engine.num_steps == 0
    stop(device)
    start()
    client.send("fence", chat("y"))
    assert client.done("fence").status == 200
    assert len(client.of("1", "done")) == 1, "it is known to have arrived"


def test_a_request_that_waits_to_be_run_again_can_be_cancelled(
    start: StartDevice, leave: Leave, client: Client
) -> None:
    leave(stored("1", "x"), stored("2", "y"))
    engine = FakeEngine()
    engine.gate.clear()
    device = start(engine)
    wait_until(lambda: device.service.stats().num_running == 1)
    client.cancel("2")
    client.send("3", chat("z"))
    client.event("3", "accepted")
    engine.gate.set()
    assert client.done("2").status == 499
    assert client.done("3").status == 200


def test_a_request_whose_runs_have_all_ended_in_a_crash_is_not_run(
    start: StartDevice, leave: Leave, client: Client
) -> None:
    leave(stored("1", "x", starts=2), stored("2", "y"))
    start()
    assert client.done("1").body["error"]["code"] == "crashed"
    assert text_of(client.done("2")) == "You said: y"


def test_safe_mode_runs_nothing_again_and_takes_what_is_new(start: StartDevice, leave: Leave, client: Client) -> None:
    leave(stored("1", "there when the process ended"))
    start(problem="safe mode")
    assert client.done("1").body["error"]["code"] == "crashed"
    client.send("2", chat("new"))
    assert text_of(client.done("2")) == "You said: new"


def test_safe_mode_is_told_in_the_info(broker: EmbeddedBroker, start: StartDevice) -> None:
    with Client(broker.address, "watcher", NAME, extra=(f"qwedge/v1/dev/{NAME}/info",)) as watcher:
        start(problem="safe mode: why")
        watcher.wait(
            lambda: "safe mode: why" in [m.value.problem for m in watcher.received if m.topic.endswith("/info")]
        )


def test_a_stored_request_that_cannot_be_read_is_forgotten(start: StartDevice, leave: Leave, client: Client) -> None:
    broken, whole = stored("1", "x"), stored("2", "y")
    leave(replace(broken, reply=b"\0"), replace(broken, key=replace(broken.key, id="3"), request=b"\0\n{}"), whole)
    first = start()
    assert text_of(client.done("2")) == "You said: y"
    stop(first)
    device = start()
    assert device.bridge.stats().num_running == 0
    client.send("1", chat("z"))
    assert client.done("1").status == 200


def test_stopping_leaves_what_has_not_begun_for_the_next_start(
    start: StartDevice, leave: Leave, client: Client
) -> None:
    leave(stored("1", "x"), stored("2", "y"))
    engine = FakeEngine(lambda _: "z" * 4000, step_s=0.01)
    device = start(engine)
    wait_until(lambda: device.service.stats().num_running == 1)
    stop(device)
    assert client.done("1").status == 503
    assert client.of("2", "done") == []
    start()
    assert text_of(client.done("2")) == "You said: y"


# --- the moment of acceptance -----------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """The disk of all journals, at our command."""
    disk, commit = Disk(), JournalFile.commit

    def guarded(file: JournalFile, statements: list[Any]) -> None:
        assert disk.works.wait(60)
        if disk.error is not None:
            raise disk.error
        commit(file, statements)

    monkeypatch.setattr(JournalFile, "commit", guarded)
    monkeypatch.setattr(edge.journal, "PROBE_S", 0.2)
    yield disk
    disk.works.set()


def test_nothing_is_said_before_the_request_is_stored(start: StartDevice, disk: Disk, client: Client) -> None:
    device = start()
    disk.works.clear()
    client.send("1", chat("x", stream=True))
    wait_until(lambda: device.engine.num_steps > 3)
    time.sleep(0.2)
    assert device.bridge._connection._acks._unacked, "the broker still keeps it for us"
    assert client.received == []
    disk.works.set()
    assert client.done("1").status == 200
    assert [e.event for e in client.of("1", "evt")] == ["accepted", "queued", "started"]
    assert "".join(batch.text for batch in client.of("1", "tok")) == "You said: x"
    wait_until(lambda: not device.bridge._connection._acks._unacked)


def test_a_message_that_comes_again_over_a_new_link_runs_once(start: StartDevice, disk: Disk, client: Client) -> None:
    device = start()
    disk.works.clear()
    client.send("1", chat("x"))
    wait_until(lambda: device.engine.num_steps > 3)
    link = device.bridge._connection.socket()
    assert link is not None
    link.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: not device.bridge.connected)
    wait_until(lambda: device.bridge.connected)
    wait_until(lambda: device.bridge.stats().num_requests == 2)
    disk.works.set()
    assert client.done("1").status == 200
    client.send("fence", chat("y"))
    client.done("fence")
    assert len(client.of("1", "done")) == 1
    wait_until(lambda: not device.bridge._connection._acks._unacked)


def test_a_message_that_may_have_ended_the_process_is_stored_before_it_runs(
    start: StartDevice, disk: Disk, client: Client
) -> None:
    device = start()
    disk.works.clear()
    topic = f"{client.device}/req/{client.name}/1"
    acknowledged = threading.Event()
    payload = json.dumps(chat("x")).encode()
    device.bridge._intake.put(Incoming(topic, payload, retain=False, redelivered=True, ack=acknowledged.set))
    time.sleep(0.2)
    assert (device.engine.num_steps, acknowledged.is_set()) == (0, False)
    disk.works.set()
    assert text_of(client.done("1")) == "You said: x"
    assert acknowledged.is_set()
    assert [e.event for e in client.of("1", "evt")] == ["accepted", "queued", "started"]


def test_while_the_disk_refuses_requests_are_refused_and_answers_wait(
    start: StartDevice, disk: Disk, client: Client
) -> None:
    engine = FakeEngine()
    device = start(engine)
    client.send("0", chat("before"))
    client.done("0")
    engine.gate.clear()
    client.send("1", chat("x"))
    client.event("1", "started")
    disk.error = sqlite3.OperationalError("database or disk is full")
    for number in range(30):  # more than the broker sends without acknowledgement
        client.send(f"refused{number}", chat("y"))
    for number in range(30):
        done = client.done(f"refused{number}")
        assert (done.status, done.retry_after_ms) == (503, 5000)
        assert "mqtt.journal" in done.body["error"]["hint"]
    client.send("0", chat("before"))
    assert client.done("0", 2).replayed, "what is stored can still be read"
    engine.gate.set()
    wait_until(lambda: device.service.stats().num_running == 0)
    time.sleep(0.2)
    assert client.of("1", "done") == []
    client.send("1", chat("x", attempt=2))
    assert client.done("1").status == 503, "where the answer is wanted cannot be stored"
    disk.error = None
    began = time.monotonic()
    client.wait(lambda: client.of("1", "done")[-1].status == 200)
    assert time.monotonic() - began < 5
    client.send("refused0", chat("y"))
    assert client.done("refused0", 2).status == 200
    wait_until(lambda: not device.bridge._connection._acks._unacked)


def test_acknowledgements_go_out_in_the_order_of_the_messages() -> None:
    sent: list[int] = []
    acks = Acknowledgements(sent.append)
    first, second, third = (acks.expect(mid) for mid in (11, 12, 13))
    second()
    assert sent == []
    first()
    assert sent == [11, 12]
    acks.forget()  # as a new link does
    third()
    assert sent == [11, 12]
