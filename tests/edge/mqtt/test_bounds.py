"""What is kept in memory is bounded: the inbox by number and bytes. What the ledger knows of requests and copies."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from edge.errors import ConflictError
from edge.journal import Journal, Limits
from edge.mqtt.inbox import MAX_BYTES, MAX_MESSAGES, Inbox
from edge.mqtt.ledger import Job, Ledger, Reply
from edge.mqtt.messages import Done
from edge.mqtt.packets import Incoming
from edge.mqtt.stored import pack, pack_reply
from edge.mqtt.topics import Layout, RequestId
from tests.edge.journals import settled

LAYOUT = Layout("qwedge", "d")


def make_job(number: int, *, payload: bytes = b"x") -> Job:
    request = RequestId("c", str(number))
    return Job(request, payload, Reply(request.id, LAYOUT.reply(request), plain=False), stream=False)


def make_done(text: str = "") -> Done:
    return Done(id="1", status=200, body={"text": text})


@pytest.fixture
def journal() -> Iterator[Journal]:
    journal = Journal()
    journal.open()
    yield journal
    journal.close()


def finish(journal: Journal, ledger: Ledger, job: Job, done: Done | None) -> Reply:
    """Let a job run, and end as a device ends it."""
    message = Incoming(LAYOUT.request(job.request), b"x", retain=False)
    assert settled(journal.accept, pack(job, message)) is None
    outcome = None if done is None else done.encode()
    assert settled(journal.settle, job.key, pack_reply(job.reply), outcome) is None
    return ledger.close(job)


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


def test_the_newest_copy_says_where_the_answer_goes(journal: Journal) -> None:
    ledger, first, second = Ledger(journal), make_job(1), make_job(1)
    assert ledger.open(first) is None
    assert ledger.open(second) is first
    assert finish(journal, ledger, first, make_done("x")) is second.reply
    assert ledger.open(make_job(1)) == make_done("x")


def test_another_payload_under_the_same_id_is_a_conflict_while_and_after_it_runs(journal: Journal) -> None:
    ledger, job = Ledger(journal), make_job(1)
    ledger.open(job)
    with pytest.raises(ConflictError):
        ledger.open(make_job(1, payload=b"y"))
    finish(journal, ledger, job, make_done())
    with pytest.raises(ConflictError):
        ledger.open(make_job(1, payload=b"y"))


def test_what_is_not_kept_runs_again(journal: Journal) -> None:
    ledger, job = Ledger(journal), make_job(1)
    ledger.open(job)
    finish(journal, ledger, job, None)
    assert ledger.open(make_job(1, payload=b"y")) is None


def test_an_adopted_request_is_shared_by_its_copies(journal: Journal) -> None:
    ledger, job = Ledger(journal), make_job(1)
    assert ledger.adopt(job)
    assert not ledger.adopt(make_job(1))
    assert ledger.open(make_job(1)) is job
    ledger.close(job)
    assert not ledger.running()


def test_without_a_folder_little_is_remembered() -> None:
    journal = Journal(limits=Limits(rows=3))
    journal.open()
    ledger = Ledger(journal)
    for number in range(5):
        job = make_job(number)
        assert ledger.open(job) is None
        finish(journal, ledger, job, make_done())
    assert ledger.open(make_job(0)) is None
    assert ledger.open(make_job(4)) == make_done()
    journal.close()
