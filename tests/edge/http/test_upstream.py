"""Requests for models that another server answers for: passed on, marked, and never anywhere else."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge.cli import run
from edge.config import load_settings
from edge.errors import ConfigError
from edge.http.access import Access
from edge.http.keys import Key, KeyRing, add_key, hash_key
from edge.http.upstream import Upstream
from edge.settings.server import ServerSettings
from edge.settings.upstream import UpstreamSettings
from tests.fakes import MODEL_NAME, FakeEngine
from tests.serving import Served, wait_for

Serve = Callable[..., Served]
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BIG = "big-9b"


@pytest.fixture
def device(serve: Serve) -> Callable[..., Served]:
    """A device that passes requests for :data:`BIG` on to a URL."""

    def start(url: str, app: dict[str, Any] | None = None, **settings: Any) -> Served:
        upstream = UpstreamSettings(name="gateway", url=url, models=(BIG, MODEL_NAME), **settings)
        engine = FakeEngine(reply=lambda _: "from the device")
        app = {"upstreams": (Upstream.load(upstream),), **(app or {})}
        return serve(engine, app=app, upstream=(upstream,))

    return start


def renamed(server: Served) -> Served:
    """A server whose model has the other name."""
    object.__setattr__(server.service.model.manifest, "name", BIG)
    return server


@contextmanager
def canned(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that says what it is told to, one connection after the other; gives its URL and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run_all() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(5)
                    request = b""
                    while b"\r\n\r\n" not in request or not request.rstrip().endswith(b"}"):
                        request += connection.recv(65536)
                    asked.append(request)
                    connection.sendall(answer)

        thread = threading.Thread(target=run_all)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", asked
        thread.join(60)


def ask(server: Served, **body: Any) -> Any:
    return server.client.post("/v1/chat/completions", json=CHAT | {"model": BIG} | body)


def test_an_answer_is_passed_on_and_marked(serve: Serve, device: Callable[..., Served]) -> None:
    other = renamed(serve(FakeEngine(reply=lambda _: "from afar")))
    server = device(f"{other.url}/v1")
    answer = ask(server)
    assert answer.headers["x-qwedge-upstream"] == "gateway"
    assert answer.json()["upstream"] == "gateway"
    assert answer.json()["choices"][0]["message"]["content"] == "from afar"
    assert server.engine.num_steps == 0
    own = server.client.post("/v1/chat/completions", json=CHAT)
    assert own.json()["choices"][0]["message"]["content"] == "from the device"
    assert "x-qwedge-upstream" not in own.headers
    # A model that the device has is its own business, whatever is configured.
    assert ask(server, model=MODEL_NAME).json()["choices"][0]["message"]["content"] == "from the device"
    assert ask(server, model="third").status_code == 404


def test_a_stream_is_passed_on_as_it_comes(serve: Serve, device: Callable[..., Served]) -> None:
    other = renamed(serve(FakeEngine(reply=lambda _: "from afar")))
    server = device(f"{other.url}/v1")
    with server.client.stream("POST", "/v1/chat/completions", json=CHAT | {"model": BIG, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        first = next(lines)
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in (first, *rest[:-1])]
    assert {chunk["upstream"] for chunk in chunks} == {"gateway"}
    assert "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]) == "from afar"


def test_whoever_leaves_ends_the_work_there(serve: Serve, device: Callable[..., Served]) -> None:
    other = renamed(serve(FakeEngine(reply=lambda _: "x" * 3000, step_s=0.01)))
    server = device(f"{other.url}/v1")
    with server.client.stream("POST", "/v1/chat/completions", json=CHAT | {"model": BIG, "stream": True}) as response:
        assert next(response.iter_lines())
        wait_for(lambda: other.service.stats().num_running == 1)
    wait_for(lambda: other.service.stats().num_running == 0)


def test_what_is_wrong_with_a_request_is_said_by_the_upstream(serve: Serve, device: Callable[..., Served]) -> None:
    other = renamed(serve())
    answer = ask(device(f"{other.url}/v1"), temperature=-1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")
    assert answer.headers["x-qwedge-upstream"] == "gateway"


def test_only_the_operators_key_goes_there(device: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("operators\n")
    with canned(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nSet-Cookie: a=b\r\nX-Secret: c\r\n\r\n{}") as (url, asked):
        server = device(url, key_file=tmp_path / "key")
        secret = {"authorization": "Bearer clients", "cookie": "clients=1", "x-api-key": "clients"}
        answer = server.client.post("/v1/chat/completions", json=CHAT | {"model": BIG}, headers=secret)
    assert answer.json() == {"upstream": "gateway"}
    assert not {"set-cookie", "x-secret"} & set(answer.headers)
    assert b"clients" not in asked[0]
    assert b"authorization: Bearer operators" in asked[0]
    assert asked[0].startswith(b"POST /v1/chat/completions ")


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", 502, "upstream_failed"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", 502, "upstream_failed"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", 502, "upstream_failed"),
        (b"HTTP/1.1 429 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n", 429, "overloaded"),
        (b"no HTTP at all\r\n\r\n", 502, "upstream_failed"),
        (b"", 502, "upstream_failed"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000, 502, "upstream_failed"),
    ],
)
def test_what_is_no_answer(device: Callable[..., Served], answer: bytes, status: int, code: str) -> None:
    with canned(answer) as (url, _):
        server = device(url)
        response = ask(server)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert server.engine.num_steps == 0  # it never falls back
    if status == 429:
        assert response.headers["retry-after"] == "7"


def test_an_upstream_that_is_away_or_silent(device: Callable[..., Served]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        silent = ask(device(url, timeout_s=0.3))
    assert (silent.status_code, silent.json()["error"]["code"]) == (504, "upstream_failed")
    assert ask(device(url)).status_code == 502


def test_an_answer_that_breaks_off_breaks_off(device: Callable[..., Served]) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with canned(head + b'e\r\ndata: {"a":1}\n\r\n') as (url, _):
        server = device(url)
        with pytest.raises(Exception, match=r"incomplete|closed"):
            ask(server, stream=True)


def test_models_tell_who_answers(device: Callable[..., Served]) -> None:
    server = device("http://127.0.0.1:1/v1")
    models = {model["id"]: model["owned_by"] for model in server.client.get("/v1/models").json()["data"]}
    assert models == {MODEL_NAME: "qwedge", BIG: "gateway"}
    assert server.client.get(f"/v1/models/{BIG}").json()["owned_by"] == "gateway"


def test_keys_count_for_these_models_too(device: Callable[..., Served], tmp_path: Path) -> None:
    key = Key(name="own", sha256=hash_key("k"), scopes=frozenset({"generate"}), models=(MODEL_NAME,))
    add_key(tmp_path / "keys.json", key)
    access = Access(KeyRing(tmp_path / "keys.json"), ServerSettings(), local=True)
    server = device("http://127.0.0.1:1/v1", app={"access": access})
    headers = {"authorization": "Bearer k"}
    assert server.client.post("/v1/chat/completions", json=CHAT | {"model": BIG}, headers=headers).status_code == 403
    assert server.client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200


def test_its_certificate_is_checked(serve: Serve, device: Callable[..., Served], tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    assert run(["tls", "init", "--folder", str(folder)]) == 0
    other = renamed(serve(tls_cert=folder / "device.pem", tls_key=folder / "device.key"))
    assert ask(device(f"{other.url}/v1")).status_code == 502
    assert ask(device(f"{other.url}/v1", tls_ca=folder / "ca.pem")).json()["upstream"] == "gateway"


UPSTREAM = '[[server.upstream]]\nname = "gateway"\nurl = "https://gateway.example/v1"\nmodels = ["big-9b"]\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (UPSTREAM.replace("https", "ftp"), "number 1: url must be"),
        (UPSTREAM.replace("big-9b", ""), "number 1"),
        (UPSTREAM + "color = 1\n", "has no key 'color'"),
        (UPSTREAM + UPSTREAM, "of its own"),
        (UPSTREAM.replace("name", "nam"), "number 1"),
    ],
)
def test_mistakes_in_the_settings(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "qwedge.toml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_settings(tmp_path / "qwedge.toml")


def test_settings(tmp_path: Path) -> None:
    (tmp_path / "qwedge.toml").write_text(UPSTREAM)
    (upstream,) = load_settings(tmp_path / "qwedge.toml").server.upstream
    assert upstream.address == ("gateway.example", 443, "/v1", True)
    with pytest.raises(ConfigError, match="cannot be read"):
        Upstream.load(upstream.model_copy(update={"key_file": tmp_path / "missing"}))
