"""Evaluations over HTTP: one at a time, followed, cancelled, kept and compared; others are served meanwhile."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge.evaluation import background
from edge.evaluation.background import BackgroundEvaluations
from edge.scheduler import Scheduler
from edge.service import Loaded
from edge.settings.server import ServerSettings
from tests.edge.http.malformed import odd_bodies
from tests.fakes import FakeEngine, make_model, make_service
from tests.serving import Served, serving, wait_for


@contextmanager
def evaluating(folder: Path, engine: FakeEngine) -> Iterator[Served]:
    """A server that keeps its reports in a folder."""
    import httpx

    service = make_service(engine)
    evaluations = BackgroundEvaluations(service, folder)
    with (
        serving(service, ServerSettings(port=0), evaluations=lambda: evaluations) as (host, port),
        httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client,
    ):
        try:
            yield Served(f"http://{host}:{port}", port, engine, service, client)
        finally:
            engine.gate.set()


def says(text: str, **options: Any) -> FakeEngine:
    return FakeEngine(reply=lambda _: text, prefill_chunk=8192, context_length=8192, **options)


def start(server: Served, limit: int = 6) -> dict[str, Any]:
    response = server.client.post("/v1/evaluations", json={"suite": "factory", "limit": limit})
    assert response.status_code == 202, response.text
    return dict(response.json())


def ended(server: Served, run_id: str) -> dict[str, Any]:
    # One that was over before it was ended is forgotten then.
    wait_for(lambda: state(server, run_id).get("state") != "running")
    return state(server, run_id)


def state(server: Served, run_id: str) -> dict[str, Any]:
    return dict(server.client.get(f"/v1/evaluations/{run_id}").json())


def test_a_run_is_followed_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations"
    with evaluating(folder, says("CHECK")) as server:
        overview = server.client.get("/v1/evaluations").json()
        assert {"factory", "maths", "code"} <= {suite["name"] for suite in overview["suites"]}
        assert (overview["running"], overview["runs"]) == (None, [])
        run = start(server)
        assert (run["suite"], run["total"]) == ("factory", 6)
        report = ended(server, run["id"])
        assert (report["state"], report["done"], len(report["cases"])) == ("done", 6, 6)
        assert report["passed"] == sum(case["passed"] for case in report["cases"])
        assert "CHECK" in {case["answer"] for case in report["cases"]}
        assert all(case["passed"] or case["reasons"] or case["error"] for case in report["cases"])
    with evaluating(folder, says("CHECK")) as server:
        (kept,) = server.client.get("/v1/evaluations").json()["runs"]
        assert (kept["id"], kept["passed"]) == (run["id"], report["passed"])
        assert server.client.delete(f"/v1/evaluations/{run['id']}").status_code == 204
        assert server.client.get("/v1/evaluations").json()["runs"] == []


def test_two_runs_are_compared(tmp_path: Path) -> None:
    ids, passed = [], []
    for answer in ("STOP", "CHECK"):
        with evaluating(tmp_path, says(answer)) as server:
            report = ended(server, start(server, limit=20)["id"])
            ids.append(report["id"])
            passed.append({case["id"] for case in report["cases"] if case["passed"]})
    with evaluating(tmp_path, says("")) as server:
        compared = server.client.get(f"/v1/evaluations/{ids[1]}?compare={ids[0]}").json()["comparison"]
        assert set(compared["gained"]) == passed[1] - passed[0] != set()
        assert set(compared["lost"]) == passed[0] - passed[1]
        assert server.client.get(f"/v1/evaluations/{ids[1]}?compare=x").status_code == 404


def test_one_at_a_time_and_it_can_be_cancelled(tmp_path: Path) -> None:
    with evaluating(tmp_path, says("CHECK", step_s=0.02)) as server:
        run = start(server, limit=50)
        refused = server.client.post("/v1/evaluations", json={"suite": "factory"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        wait_for(lambda: state(server, run["id"])["done"] >= 1)
        assert server.client.get("/v1/evaluations").json()["running"]["id"] == run["id"]
        assert server.client.delete(f"/v1/evaluations/{run['id']}").status_code == 204
        cancelled = ended(server, run["id"])
        assert cancelled["state"] == "cancelled"
        assert 1 <= len(cancelled["cases"]) < 50
        assert list(tmp_path.iterdir()) == []
        wait_for(lambda: server.service.stats().num_running == 0)
        assert ended(server, start(server, limit=1)["id"])["state"] == "done"


def test_others_are_served_meanwhile(tmp_path: Path) -> None:
    with evaluating(tmp_path, says("CHECK", slots=1, step_s=0.01)) as server:
        run = start(server, limit=60)
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        for _ in range(3):
            assert server.client.post("/v1/chat/completions", json=body).status_code == 200
            assert server.service.stats().num_waiting <= 1
        assert state(server, run["id"])["state"] == "running"
        server.client.delete(f"/v1/evaluations/{run['id']}")
        ended(server, run["id"])


def test_a_service_that_stops_ends_the_run(tmp_path: Path) -> None:
    with evaluating(tmp_path, says("CHECK", step_s=0.02)) as server:
        run = start(server, limit=50)
        wait_for(lambda: state(server, run["id"])["done"] >= 1)
        server.service.stop()
        failed = ended(server, run["id"])
        assert failed["state"] == "failed"
        assert "shut" in failed["error"]["message"]


def test_a_switch_of_the_model_ends_the_run(tmp_path: Path) -> None:
    def load() -> Loaded:
        engine = says("STOP", step_s=0.02)
        return Loaded(make_model(engine.context_length), Scheduler(engine, max_queue=8))

    with evaluating(tmp_path, says("CHECK", step_s=0.02)) as server:
        run = start(server, limit=50)
        wait_for(lambda: state(server, run["id"])["done"] >= 1)
        server.service.switch(load, drain_s=5)
        failed = ended(server, run["id"])
        assert failed["state"] == "failed"
        assert failed["error"]["message"]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suite": "code"}, "suite"),
        ({"suite": "nothing"}, "suite"),
        ({"suite": "../suite"}, "suite"),
        ({"suite": "factory", "limit": 0}, "limit"),
        ({"suite": "factory", "limit": "5"}, "limit"),
        ({}, "suite"),
    ],
)
def test_what_is_refused(tmp_path: Path, body: dict[str, Any], param: str) -> None:
    with evaluating(tmp_path, says("")) as server:
        response = server.client.post("/v1/evaluations", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        if body.get("suite") == "code":
            assert "--allow-code" in response.json()["error"]["hint"]


def test_malformed_bodies_are_refused(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    fields = ("suite", "limit")
    with evaluating(tmp_path, says("CHECK")) as server:
        for body in odd_bodies(random.Random(seed), 150, {"suite": "factory", "limit": 1}, fields):
            response = server.client.post("/v1/evaluations", content=body)
            assert response.status_code in {202, 400, 404, 409, 413}, body
            if response.status_code == 202:
                server.client.delete(f"/v1/evaluations/{response.json()['id']}")
                ended(server, response.json()["id"])


def test_ids_lead_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "evaluations"
    folder.mkdir()
    with evaluating(folder, says("")) as server:
        for run_id in ("..%2Fsecret", "secret", "20260101-000000000-factory-0000", "x" * 300):
            for call in (server.client.get, server.client.delete):
                assert call(f"/v1/evaluations/{run_id}").status_code == 404
    assert (tmp_path / "secret.json").exists()


def test_old_reports_go_and_damaged_ones_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "MAX_REPORTS", 2)
    for number in range(3):
        (tmp_path / f"2026010{number}-000000000-factory-0000.json").write_text("{" * number)
    with evaluating(tmp_path, says("CHECK")) as server:
        assert len(server.client.get("/v1/evaluations").json()["runs"]) == 3
        run = start(server, limit=1)
        ended(server, run["id"])
    names = sorted(path.stem for path in tmp_path.iterdir())
    assert names == ["20260102-000000000-factory-0000", run["id"]]
    assert json.loads((tmp_path / f"{run['id']}.json").read_text())["suite"] == "factory"


def test_reports_hold_no_questions_of_users(tmp_path: Path) -> None:
    secret = "what my boss must not know"
    with evaluating(tmp_path, says("CHECK", step_s=0.005)) as server:
        run = start(server, limit=10)
        server.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": secret}]})
        ended(server, run["id"])
    assert all(secret not in path.read_text() for path in tmp_path.iterdir())
