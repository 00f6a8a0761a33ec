"""Health as supervisors and load balancers ask for it; which models a key sees."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edge.http.access import Access
from edge.http.keys import Key, KeyRing, add_key, hash_key
from edge.settings.server import ServerSettings
from tests.fakes import MODEL_NAME, FakeEngine
from tests.serving import Served, wait_for

Serve = Callable[..., Served]


def statuses(server: Served) -> tuple[int, int, int]:
    overall, live, ready = (
        server.client.get(path).status_code for path in ("/health", "/health/live", "/health/ready")
    )
    return overall, live, ready


def test_idle(server: Served) -> None:
    assert statuses(server) == (200, 200, 200)
    body = server.client.get("/health").json()
    assert (body["live"], body["ready"]) == (True, True)


def test_a_full_queue_is_alive_and_not_ready(serve: Serve) -> None:
    server = serve(FakeEngine(slots=1), max_queue=1)
    with server.occupied():
        assert statuses(server) == (200, 200, 503)
    wait_for(lambda: statuses(server) == (200, 200, 200))


def test_an_engine_that_hangs_wants_a_restart(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.scheduler_stats.STALLED_AFTER_S", 0.2)
    server = serve()
    server.engine.gate.clear()
    with server.asking():
        wait_for(lambda: statuses(server) == (503, 503, 503))
        server.engine.gate.set()
    wait_for(lambda: statuses(server) == (200, 200, 200))


def test_a_server_that_stops_is_alive(serve: Serve) -> None:
    server = serve()
    server.service.stop()
    assert statuses(server) == (503, 200, 503)


def test_what_does_not_work_is_no_reason_to_stay_away(serve: Serve) -> None:
    server = serve(app={"problem": lambda: "the disk is full"})
    assert statuses(server) == (200, 200, 200)
    body = server.client.get("/health").json()
    assert (body["status"], body["problem"]) == ("degraded", "the disk is full")


def test_a_key_sees_its_models(serve: Serve, tmp_path: Path) -> None:
    for name, model in (("own", MODEL_NAME), ("other", "another")):
        key = Key(name=name, sha256=hash_key(name), scopes=frozenset({"generate"}), models=(model,))
        add_key(tmp_path / "keys.json", key)
    server = serve(app={"access": Access(KeyRing(tmp_path / "keys.json"), ServerSettings(), local=True)})

    def seen(key: str) -> tuple[list[str], int]:
        headers = {"authorization": f"Bearer {key}"}
        names = [model["id"] for model in server.client.get("/v1/models", headers=headers).json()["data"]]
        return names, server.client.get(f"/v1/models/{MODEL_NAME}", headers=headers).status_code

    assert seen("own") == ([MODEL_NAME], 200)
    assert seen("other") == ([], 403)
