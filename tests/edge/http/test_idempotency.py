"""Requests that are sent again under their key: one answer, whatever happens to client and server in between."""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge.http import idempotency, shared_answer
from edge.http.access import Access
from edge.http.keys import Key as ClientKey
from edge.http.keys import KeyRing, add_key, hash_key
from edge.http.rights import OWNER
from edge.journal import Entry, Journal, Key
from edge.settings.server import ServerSettings
from tests.edge.journals import settled
from tests.fakes import FakeEngine
from tests.serving import Served, served, wait_for

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 1.0, "max_tokens": 20}
KEY = {"idempotency-key": "7f3a-1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Served]]:
    """Start a server with the journal of the folder; starting another one ends it first."""
    running: list[ExitStack] = []

    def stop() -> None:
        while running:
            running.pop().close()

    def begin(engine: FakeEngine | None = None, **app: Any) -> Served:
        stop()
        stack = ExitStack()
        journal = Journal(folder)
        stack.callback(journal.close)
        running.append(stack)
        app = {"journal": journal, **app}
        settings = ServerSettings(port=0)
        return stack.enter_context(served(engine or counting(), max_queue=8, settings=settings, **app))

    yield begin
    stop()


def counting() -> FakeEngine:
    """Each answer of it is another one."""
    numbers = iter(range(1000))
    return FakeEngine(reply=lambda _: f"answer {next(numbers)}")


def ask(server: Served, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> httpx.Response:
    return server.client.post("/v1/chat/completions", json=body or CHAT, headers=KEY | (headers or {}))


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_the_answer_comes_again(start: Callable[..., Served]) -> None:
    server = start()
    first, again = ask(server), ask(server)
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.content == first.content
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert text(ask(server, headers={"idempotency-key": "other"})) != text(first)
    assert text(ask(server, headers={"idempotency-key": '"7f3a-1"'})) == text(first)


def test_after_a_restart_too(start: Callable[..., Served]) -> None:
    first = ask(start())
    again = ask(start())
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"


def test_a_stream_comes_again_as_a_whole(start: Callable[..., Served]) -> None:
    streamed = CHAT | {"stream": True}
    first = ask(start(), streamed)
    again = ask(start(), streamed)
    assert again.content == first.content
    assert again.text.endswith("data: [DONE]\n\n")
    assert again.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT | {"seed": 1}), ("/v1/completions", CHAT)])
def test_another_request_under_the_key_is_refused(start: Callable[..., Served], path: str, body: Any) -> None:
    server = start()
    first = ask(server)
    refused = server.client.post(path, json=body, headers=KEY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert ask(server).content == first.content


@pytest.mark.parametrize("stream", [False, True])
def test_copies_share_the_running_one(start: Callable[..., Served], stream: bool) -> None:
    engine = counting()
    server = start(engine)
    engine.gate.clear()
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(ask, server, CHAT | {"stream": stream}) for _ in range(5)]
        wait_for(lambda: server.service.stats().num_running == 1)
        refused = ask(server, CHAT | {"seed": 7})
        engine.gate.set()
        answers = [future.result() for future in asked]
    assert refused.status_code == 422
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 4
    assert 'qwedge_requests_total{outcome="stop"} 1.0' in server.client.get("/metrics").text


def test_whoever_loses_the_link_finds_the_answer(start: Callable[..., Served]) -> None:
    engine = counting()
    server = start(engine)
    engine.gate.clear()
    body = json.dumps(CHAT).encode()
    with server.connect() as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: 7f3a-1\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_for(lambda: server.service.stats().num_running == 1)
        sock.shutdown(socket.SHUT_RDWR)
    engine.gate.set()
    wait_for(lambda: server.service.stats().num_running == 0)
    # httpx writes the same JSON without spaces: the bytes have to be the same.
    again = server.client.post("/v1/chat/completions", content=body, headers=KEY)
    assert text(again) == "answer 0"
    assert again.headers["idempotent-replayed"] == "true"


def test_what_failed_may_be_tried_again(start: Callable[..., Served]) -> None:
    replies = iter([RuntimeError("broken"), "whole"])

    def reply(_prompt: str) -> str:
        word = next(replies)
        if isinstance(word, Exception):
            raise word
        return word

    server = start(FakeEngine(reply=reply))
    assert ask(server).status_code == 500
    assert text(ask(server)) == "whole"


def test_a_stream_that_failed_may_be_tried_again(start: Callable[..., Served]) -> None:
    engine = FakeEngine(fail_after=3)
    server = start(engine)
    first = ask(server, CHAT | {"stream": True})
    assert '"error"' in first.text
    engine._fail_after = None
    again = ask(server, CHAT | {"stream": True})
    assert '"error"' not in again.text
    assert "idempotent-replayed" not in again.headers


def test_a_refusal_is_not_kept(start: Callable[..., Served]) -> None:
    server = start()
    assert ask(server, CHAT | {"temperature": -1}).status_code == 400
    assert ask(server).status_code == 200


def test_each_client_has_keys_of_its_own(start: Callable[..., Served], tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    for name in ("one", "two"):
        add_key(tmp_path / "keys.json", ClientKey(name=name, sha256=hash_key(name), scopes=frozenset({"generate"})))
    server = start(access=Access(ring, ServerSettings(), local=True))
    one, two = ({"authorization": f"Bearer {name}"} for name in ("one", "two"))
    assert text(ask(server, headers=one)) == "answer 0"
    assert text(ask(server, headers=two)) == "answer 1"
    assert text(ask(server, headers=one)) == "answer 0"


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\xe4", '"a', 'a"b', '""'])
def test_what_is_no_key(start: Callable[..., Served], key: str) -> None:
    response = ask(start(), headers={"idempotency-key": key.encode("latin-1")})  # type: ignore[dict-item]
    assert response.status_code == 400


def entry(starts: int) -> Entry:
    """What a crash leaves of the request."""
    body = httpx.Request("POST", "http://x", json=CHAT).content
    fingerprint = hashlib.sha256(b"/v1/chat/completions\0" + body).digest()
    return Entry(Key(OWNER, "7f3a-1"), fingerprint, reply=b"", request=b"", starts=starts)


@pytest.mark.parametrize(("starts", "status"), [(1, 200), (2, 500)])
def test_a_request_that_ends_the_process_is_run_twice_at_most(
    start: Callable[..., Served], folder: Path, starts: int, status: int
) -> None:
    journal = Journal(folder)
    journal.open()
    assert settled(journal.accept, entry(starts)) is None
    journal.close()
    server = start()
    response = ask(server)
    assert response.status_code == status
    if status == 500:
        assert response.json()["error"]["code"] == "crashed"
        assert ask(server).status_code == 500


def test_what_a_crash_left_is_forgotten_in_time(
    start: Callable[..., Served], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "FORGET_S", -1.0)
    journal = Journal(folder)
    journal.open()
    assert settled(journal.accept, entry(2)) is None
    journal.close()
    assert ask(start()).status_code == 200


def test_a_disk_that_refuses_is_said_before_anything_runs(start: Callable[..., Served], folder: Path) -> None:
    other = Journal(folder)
    other.open()
    server = start()
    refused = ask(server)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert server.engine.num_steps == 0
    assert server.client.post("/v1/chat/completions", json=CHAT).status_code == 200
    other.close()
    assert ask(server).status_code == 200


def test_the_journal_is_opened_when_it_is_needed(start: Callable[..., Served], folder: Path) -> None:
    server = start()
    server.client.post("/v1/chat/completions", json=CHAT)
    server.client.get("/v1/models", headers=KEY)
    assert not folder.exists()
    assert "journal" not in {thread.name for thread in threading.enumerate()}
    ask(server)
    assert folder.exists()


def test_an_answer_that_is_too_long_is_not_kept(start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_answer, "MAX_ANSWER_BYTES", 10)
    server = start()
    assert text(ask(server)) != text(ask(server))
