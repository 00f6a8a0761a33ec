"""Who is let in: keys with their scopes, models and rates; an open server; what is free."""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge.cli import run
from edge.errors import ConfigError, RateLimitError
from edge.http import keys as module
from edge.http.access import Access, is_queued, needed_right
from edge.http.app import create_app
from edge.http.keys import KeyRing, load_keys
from edge.http.listening import bind, check_exposure
from edge.settings.server import ServerSettings
from tests.fakes import MODEL_NAME
from tests.serving import Served

Serve = Callable[..., Served]
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
PROMPT = {"prompt": "x" * 200, "max_tokens": 1}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state" / "keys.json"
    monkeypatch.setenv("QWEDGE_SERVER_KEYS_FILE", str(path))
    return path


@pytest.fixture
def add(path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Make a key as a person does: ``add("hmi", "--scope", "read")``."""

    def make(*args: str) -> str:
        assert run(["http", "add-key", *args]) == 0
        return capsys.readouterr().out.strip()

    assert not path.exists()
    return make


@pytest.fixture
def guarded(serve: Serve, path: Path) -> Callable[..., Served]:
    """A server that knows the keys of the file."""

    def start(*, local: bool = True, **settings: Any) -> Served:
        ring = KeyRing(path)
        ring.load()
        access = Access(ring, ServerSettings(**settings), local=local)
        return serve(app={"access": access, "prefix_cache_bytes": 1 << 20}, **settings)

    return start


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask(server: Served, headers: Mapping[str, str | bytes], **body: Any) -> httpx.Response:
    return server.client.post("/v1/chat/completions", json=CHAT | body, headers=headers)


def test_without_keys_every_program_of_the_device_may_do_anything(guarded: Callable[..., Served]) -> None:
    server = guarded()
    assert ask(server, {}).status_code == 200
    assert ask(server, bearer("unused")).status_code == 200
    assert server.client.get("/metrics").status_code == 200


def test_a_key_is_asked_for(guarded: Callable[..., Served], add: Callable[..., str]) -> None:
    key = add("hmi")
    server = guarded()
    for headers in (
        {},
        bearer("qwedge-wrong"),
        {"authorization": "Bearer"},
        {"authorization": f"Basic {key}"},
        {"authorization": "Bearer \xe4".encode("latin-1")},
    ):
        response = ask(server, headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "unauthorized"
    assert ask(server, bearer(key)).status_code == 200
    assert ask(server, {"x-api-key": key}).status_code == 200


def test_page_and_health_need_no_key(guarded: Callable[..., Served], add: Callable[..., str]) -> None:
    add("hmi")
    server = guarded()
    assert [server.client.get(p).status_code for p in ("/", "/health", "/static/favicon.svg")] == [200, 200, 200]
    for hidden in ("/metrics", "/v1/models", "/v1/logs", "/openapi.json", "/nothing"):
        assert server.client.get(hidden).status_code == 401
    assert server.client.post("/health").status_code == 401


def test_scopes(guarded: Callable[..., Served], add: Callable[..., str]) -> None:
    asks, reads = add("asks"), add("reads", "--scope", "read")
    both = add("both", "--scope", "read", "--scope", "generate")
    server = guarded()
    seen = {
        name: (ask(server, bearer(key)).status_code, server.client.get("/metrics", headers=bearer(key)).status_code)
        for name, key in (("asks", asks), ("reads", reads), ("both", both))
    }
    assert seen == {"asks": (200, 403), "reads": (403, 200), "both": (200, 200)}
    assert all(server.client.get("/v1/models", headers=bearer(key)).status_code == 200 for key in (asks, reads))
    assert ask(server, bearer(reads)).json()["error"]["code"] == "forbidden"


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("POST", "/v1/chat/completions", "generate"),
        ("POST", "/v1/messages/count_tokens", "generate"),
        ("POST", "/api/chat", "generate"),
        ("GET", "/v1/models", None),
        ("HEAD", "/metrics", "read"),
        ("GET", "/v1/chat/completions", "read"),
        ("DELETE", "/v1/models/x", "manage"),
        ("POST", "/api/pull", "manage"),
        ("POST", "/v1/models", "manage"),
        ("POST", "/v1/completions/../models", "manage"),
        ("BREW", "/v1/chat/completions", "manage"),
    ],
)
def test_what_is_not_known_to_be_harmless_takes_more(method: str, path: str, right: str | None) -> None:
    assert needed_right(method, path) == right


def test_a_key_for_one_model(guarded: Callable[..., Served], add: Callable[..., str]) -> None:
    other, own = add("other", "--model", "another"), add("own", "--model", MODEL_NAME)
    server = guarded()
    for body in ({}, {"model": MODEL_NAME}, {"stream": True}):
        refused = ask(server, bearer(other), **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "model")
        assert ask(server, bearer(own), **body).status_code == 200
    assert server.client.get("/v1/models", headers=bearer(other)).status_code == 200


ASKING = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/messages": CHAT | {"max_tokens": 3},
    "/api/chat": CHAT,
    "/api/generate": {"prompt": "Hi"},
    "/api/embed": {"input": "Hi"},
    "/api/embeddings": {"prompt": "Hi"},
}


@pytest.mark.parametrize("route", ASKING)
def test_every_way_to_ask_knows_who_asks(guarded: Callable[..., Served], add: Callable[..., str], route: str) -> None:
    other = add("other", "--model", "another")
    server = guarded()
    assert is_queued("POST", route)
    assert server.client.post(route, json=ASKING[route]).status_code == 401
    refused = server.client.post(route, json=ASKING[route] | {"model": MODEL_NAME}, headers=bearer(other))
    served = {getattr(known, "path", "") for known in create_app(server.service, ServerSettings()).routes}
    assert refused.status_code == (403 if route in served else 404)


def test_a_rate(guarded: Callable[..., Served], add: Callable[..., str]) -> None:
    slow, free = add("slow", "--rate", "2/min"), add("free")
    server = guarded()
    assert [ask(server, bearer(slow)).status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(server, bearer(slow))
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.json()["error"]["code"] == "rate_limited"
    assert server.client.get("/v1/models", headers=bearer(slow)).status_code == 200
    assert ask(server, bearer(free)).status_code == 200


def test_tokens_come_back_evenly(path: Path, add: Callable[..., str]) -> None:
    add("slow", "--rate", "6")
    clock = Clock()
    ring = KeyRing(path, clock=clock)
    ring.load()
    for _ in range(6):
        ring.spend("slow")
    with pytest.raises(RateLimitError) as caught:
        ring.spend("slow")
    assert caught.value.retry_after_s == pytest.approx(10)
    clock.now = 10.1
    ring.spend("slow")
    with pytest.raises(RateLimitError):
        ring.spend("slow")
    clock.now = 10_000  # an idle hour is worth a minute
    for _ in range(6):
        ring.spend("slow")
    with pytest.raises(RateLimitError):
        ring.spend("slow")


def test_a_running_server_takes_changes(guarded: Callable[..., Served], add: Callable[..., str], path: Path) -> None:
    server = guarded()
    assert ask(server, {}).status_code == 200
    key = add("hmi")
    assert ask(server, {}).status_code == 401
    assert ask(server, bearer(key)).status_code == 200
    newer = add("hmi")
    assert [ask(server, bearer(key)).status_code, ask(server, bearer(newer)).status_code] == [401, 200]
    path.write_text("{")
    assert ask(server, bearer(newer)).status_code == 200
    add_again = json.dumps({"v": 1, "keys": []})
    path.write_text(add_again)
    assert [ask(server, bearer(newer)).status_code, ask(server, {}).status_code] == [401, 401]
    path.unlink()
    assert ask(server, {}).status_code == 401


def test_prefixes_are_kept_apart(guarded: Callable[..., Served], add: Callable[..., str]) -> None:
    one, two = add("one"), add("two")
    server = guarded()

    def cached(key: str) -> int:
        answer = server.client.post("/v1/completions", json=PROMPT, headers=bearer(key)).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(one), cached(two)] == [0, 0]
    assert min(cached(one), cached(two)) > 100


def test_an_open_server_lets_everybody_ask_and_nobody_manage(
    guarded: Callable[..., Served], add: Callable[..., str]
) -> None:
    admin = add("admin", "--scope", "manage")
    server = guarded(local=False, open="on")
    assert ask(server, {}).status_code == 200
    assert server.client.delete("/v1/models/x").status_code == 403
    assert server.client.delete("/v1/models/x", headers=bearer(admin)).status_code == 405


@pytest.mark.parametrize("options", [{"open": "on"}, {"tls_client_ca": "ca", "tls_cert": "c", "tls_key": "k"}])
def test_beyond_loopback_somebody_is_kept_out_or_all_are_let_in(options: dict[str, str]) -> None:
    with bind("0.0.0.0", 0) as sock:
        with pytest.raises(ConfigError, match="no keys") as caught:
            check_exposure(sock, ServerSettings(host="0.0.0.0"), has_keys=False)
        assert "add-key" in caught.value.hint
        assert not check_exposure(sock, ServerSettings(host="0.0.0.0"), has_keys=True)
        assert not check_exposure(sock, ServerSettings(host="0.0.0.0", **options), has_keys=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "localhost", "::1"])
def test_loopback_needs_no_keys(host: str) -> None:
    with bind(host, 0) as sock:
        assert check_exposure(sock, ServerSettings(host=host), has_keys=False)


def test_nothing_of_a_key_is_stored_or_shown(
    add: Callable[..., str], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = add("hmi", "--model", "m", "--rate", "9/min")
    assert key.startswith("qwedge-")
    assert len(key) >= 43
    assert key.removeprefix("qwedge-") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert run(["http", "list-keys", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == [{"name": "hmi", "scopes": ["generate"], "models": ["m"], "rate_per_minute": 9}]
    assert add("hmi") != key


def test_remove_a_key(add: Callable[..., str], path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add("one"), add("two")
    assert run(["http", "remove-key", "one"]) == 0
    assert [key.name for key in load_keys(path) or ()] == ["two"]
    assert run(["http", "remove-key", "one"]) == 2
    assert "two" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["no name"],
        ["x" * 65],
        ["a", "--rate", "0"],
        ["a", "--rate", "fast"],
        ["a", "--scope", "all"],
        ["a", "--model", ""],
    ],
)
def test_what_makes_no_key(args: list[str], path: Path) -> None:
    assert run(["http", "add-key", *args]) == 2
    assert not path.exists()


def test_a_file_that_others_can_read_is_refused(add: Callable[..., str], path: Path) -> None:
    add("hmi")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="open to other users") as caught:
        KeyRing(path).load()
    assert "chmod 600" in caught.value.hint


def test_a_credential_is_kept_by_systemd(path: Path, add: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    add("hmi")
    path.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(path.parent))
    assert [key.name for key in load_keys(path) or ()] == ["hmi"]


def test_a_full_or_broken_disk_changes_nothing(
    add: Callable[..., str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("hmi")
    before = path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert run(["http", "add-key", "other"]) == 2
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["keys.json", "keys.json.lock"]


def test_there_is_room_for_so_many_keys(add: Callable[..., str], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 1)
    add("one")
    assert run(["http", "add-key", "two"]) == 2
    assert add("one")
    assert len(load_keys(path) or ()) == 1
