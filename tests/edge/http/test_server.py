"""The server under clients that are slow, silent or not speaking HTTP, and its start and end."""

import contextlib
import json
import resource
import socket
import time
from collections.abc import Callable

import pytest

from edge.errors import UnavailableError
from edge.http import accepting
from edge.http import server as module
from edge.http.listening import bind
from tests.fakes import FakeEngine
from tests.serving import Served, wait_for

Serve = Callable[..., Served]
NUM_SLOW = 60


@pytest.fixture(autouse=True)
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEADER_S", 0.6)
    monkeypatch.setattr(module, "BODY_S", 0.9)
    monkeypatch.setattr(module, "WRITE_S", 0.6)


def test_a_port_in_use_is_a_clear_error(server: Served) -> None:
    with pytest.raises(UnavailableError, match=str(server.port)) as caught:
        bind("127.0.0.1", server.port)
    assert caught.value.hint


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "name.invalid"])
def test_a_foreign_address_is_a_clear_error(host: str) -> None:
    with pytest.raises(UnavailableError) as caught:
        bind(host, 0)
    assert caught.value.hint


def test_localhost_means_ipv4() -> None:
    with bind("localhost", 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n{",
        # A second request that never ends, on a connection that served a first one.
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\n",
    ],
)
def test_slow_clients_are_cut_off_and_others_are_served(server: Served, start: bytes) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(NUM_SLOW)]
        for sock in slow:
            sock.sendall(start)
            sock.setblocking(False)
        since = time.monotonic()
        open_ones = slow
        while open_ones:
            assert time.monotonic() - since < 3
            # A byte now and then must not move the deadline.
            open_ones = [sock for sock in open_ones if _still_open(sock, trickle=b"a" if start else b"")]
            assert server.client.get("/health").elapsed.total_seconds() < 0.5
            time.sleep(0.1)


def test_a_stalled_reader_is_cut_off_and_its_generation_ends(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: "x" * 60_000, context_length=70_000, step_s=0.0002))
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_for(lambda: server.service.stats().num_running == 1)
        wait_for(lambda: server.service.stats().num_running == 0)
        assert 'outcome="cancelled"' in server.client.get("/metrics").text
        wait_for(lambda: _is_reset(sock))


def test_more_connections_than_allowed_are_closed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "MAX_CONNECTIONS", 5)
    monkeypatch.setattr(module, "HEADER_S", 30)
    server = serve()
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(server.connect()) for _ in range(9)]
        for sock in sockets:
            sock.setblocking(False)
        wait_for(lambda: sum(_still_open(sock) for sock in sockets) == 5)


def test_a_shortage_of_descriptors_passes(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sock = socket.socket()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        sock.connect(("127.0.0.1", server.port))
        wait_for(lambda: "cannot be accepted" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    sock.settimeout(20)
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert _read_all(sock).startswith(b"HTTP/1.1 200")
    assert caplog.text.count("cannot be accepted") == 1
    sock.close()


def test_one_address_leaves_room_for_others(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "MAX_PER_ADDRESS", 3)
    monkeypatch.setattr(module, "HEADER_S", 30)
    server = serve()
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(server.connect()) for _ in range(6)]
        for sock in sockets:
            sock.setblocking(False)
        wait_for(lambda: sum(_still_open(sock) for sock in sockets) == 3)
        other = stack.enter_context(
            socket.create_connection(("127.0.0.1", server.port), timeout=60, source_address=("127.0.0.2", 0))
        )
        other.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert _read_all(other).startswith(b"HTTP/1.1 200")
    wait_for(lambda: server.client.get("/health").status_code == 200)  # those that are gone count no more


def test_a_connection_is_closed_after_so_many_requests(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REQUESTS", 3)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server.connect() as sock:
        sock.sendall(request * 5)
        answers = _read_all(sock)
    assert answers.count(b"HTTP/1.1 200") == 3
    assert answers.count(b"connection: close") == 1


@pytest.mark.parametrize(
    ("head", "statuses"),
    [
        (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 120, {b"431"}),
        (b"GET /health HTTP/1.1\r\na: " + b"b" * 17_000 + b"\r\n", {b"400", b"431"}),
        (b"GET /health?" + b"b" * 5000 + b" HTTP/1.1\r\n", {b"431"}),
        (b"GET /health HTTP/1.1\r\na: " + b"b" * 1_000_000 + b"\r\n", {b"400", b"431"}),
    ],
)
def test_a_head_that_is_too_large_is_refused(server: Served, head: bytes, statuses: set[bytes]) -> None:
    with server.connect() as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(head + b"Host: localhost\r\nConnection: close\r\n\r\n")
        assert _read_all(sock)[9:12] in {*statuses, b""}  # an answer to what was never read may be lost
    assert server.client.get("/health").status_code == 200


def test_a_full_queue_is_noticed_before_the_body_is_looked_at(serve: Serve) -> None:
    server = serve(FakeEngine(slots=1), max_queue=1)
    with server.occupied():
        refused = server.client.post("/v1/chat/completions", content=b"no JSON")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert 'outcome="overloaded"' in server.client.get("/metrics").text
    assert server.client.post("/v1/chat/completions", content=b"no JSON").status_code == 400


@pytest.mark.parametrize(
    "request_line",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HELLO\r\n\r\n", b"GET / HTTP/1.1\r\nbad\r\n\r\n"],
)
def test_what_is_no_http_is_400_in_the_shape_of_all_errors(server: Served, request_line: bytes) -> None:
    with server.connect() as sock:
        sock.sendall(request_line + b"\r\n\r\n")
        head, _, body = _read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_broken_chunk_in_a_body_is_400(server: Served) -> None:
    with server.connect() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n"
        )
        assert _read_all(sock).startswith(b"HTTP/1.1 400")


def test_a_waiting_client_is_told_to_go_on(server: Served) -> None:
    body = b'{"prompt": "Hi", "max_tokens": 1}'
    with server.connect() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        assert sock.recv(1000).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        assert _read_all(sock).startswith(b"HTTP/1.1 200")


def test_streams_end_in_order_when_the_server_stops(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: "x" * 3000, step_s=0.01))
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith("data: "))
        server.service.stop()
        rest = [line for line in lines if line.startswith("data: ")]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
    assert rest[-1] == "data: [DONE]"


def _still_open(sock: socket.socket, trickle: bytes = b"") -> bool:
    """Whether the server still holds a connection; reads away what it sent, and sends it a little."""
    try:
        while data := sock.recv(65536):
            del data
    except BlockingIOError:
        pass
    except ConnectionError:
        return False
    else:
        return False
    try:
        sock.sendall(trickle)
    except (ConnectionError, BlockingIOError):
        return False
    return True


def _is_reset(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0 or not _still_open(sock)


def _read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            data += chunk
    return data
