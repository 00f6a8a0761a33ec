"""What is kept in memory is bounded: the inbox by number and bytes, the ledger's memory likewise."""

from __future__ import annotations

import threading

import pytest

from edge.errors import ConflictError
from edge.mqtt.connection import Incoming
from edge.mqtt.inbox import MAX_BYTES, MAX_MESSAGES, Inbox
from edge.mqtt.ledger import MAX_REMEMBERED, MAX_REMEMBERED_BYTES, Job, Ledger, Outcome, Reply
from edge.mqtt.messages import Done
from edge.mqtt.topics import Layout, RequestId

LAYOUT = Layout("qwedge", "d")


def make_job(number: int, *, payload: bytes = b"x") -> Job:
    request = RequestId("c", str(number))
    return Job(request, payload, Reply(request.id, LAYOUT.reply(request), plain=False), stream=False)


def make_outcome(text: str = "") -> Outcome:
    return Outcome(Done(id="1", status=200, body={"text": text}), text)


def test_the_inbox_holds_so_many_messages_in_order() -> None:
    inbox = Inbox()
    assert all(inbox.put(Incoming(str(number), b"", retain=False)) for number in range(MAX_MESSAGES))
    assert not inbox.put(Incoming("one more", b"", retain=False))
    first = inbox.get()
    assert first is not None
    assert first.topic == "0"
    assert inbox.put(Incoming("there is room again", None, retain=False))


def test_the_inbox_holds_so_many_bytes() -> None:
    inbox = Inbox()
    mebibyte = Incoming("t", bytes(1 << 20), retain=False)
    assert [inbox.put(mebibyte) for _ in range((MAX_BYTES >> 20) + 1)] == [True] * (MAX_BYTES >> 20) + [False]
    inbox.get()
    assert inbox.put(mebibyte)


def test_a_closed_inbox_gives_what_it_has_and_then_none() -> None:
    inbox = Inbox()
    waiting = threading.Thread(target=inbox.get)
    waiting.start()
    inbox.put(Incoming("t", b"", retain=False))
    waiting.join(5)
    inbox.put(Incoming("last", b"", retain=False))
    inbox.close()
    last = inbox.get()
    assert last is not None
    assert last.topic == "last"
    assert inbox.get() is None
    assert not inbox.put(Incoming("late", b"", retain=False))


def test_the_newest_copy_says_where_the_answer_goes() -> None:
    ledger, first, second = Ledger(), make_job(1), make_job(1)
    assert ledger.open(first) is None
    assert ledger.open(second) is first
    assert ledger.close(first, make_outcome()) is second.reply
    assert isinstance(ledger.open(make_job(1)), Outcome)


def test_another_payload_under_the_same_id_is_a_conflict_while_and_after_it_runs() -> None:
    ledger, job = Ledger(), make_job(1)
    ledger.open(job)
    with pytest.raises(ConflictError):
        ledger.open(make_job(1, payload=b"y"))
    ledger.close(job, make_outcome())
    with pytest.raises(ConflictError):
        ledger.open(make_job(1, payload=b"y"))


def test_what_is_not_remembered_runs_again() -> None:
    ledger, job = Ledger(), make_job(1)
    ledger.open(job)
    ledger.close(job, None)
    assert ledger.open(make_job(1, payload=b"y")) is None


def test_the_oldest_outcomes_are_forgotten_by_number() -> None:
    ledger = Ledger()
    for number in range(MAX_REMEMBERED + 1):
        job = make_job(number)
        ledger.open(job)
        ledger.close(job, make_outcome())
    assert ledger.open(make_job(0)) is None
    assert isinstance(ledger.open(make_job(1)), Outcome)
    assert isinstance(ledger.open(make_job(MAX_REMEMBERED)), Outcome)


def test_the_oldest_outcomes_are_forgotten_by_size() -> None:
    ledger, text = Ledger(), "x" * (MAX_REMEMBERED_BYTES // 8)
    for number in range(4):
        job = make_job(number)
        ledger.open(job)
        ledger.close(job, make_outcome(text))
    assert ledger.open(make_job(0)) is None
    assert isinstance(ledger.open(make_job(3)), Outcome)
