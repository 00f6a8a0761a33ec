"""Who waits and what is worked on: /v1/queue and /slots."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.fakes import FakeEngine
from tests.serving import Served, wait_for

Serve = Callable[..., Served]
CANARY = "canary-4711"


@contextmanager
def asking(server: Served, request_id: str, **extra: Any) -> Iterator[None]:
    """Ask under an id while the block runs."""
    body = {"messages": [{"role": "user", "content": CANARY}]} | extra
    url, headers = f"{server.url}/v1/chat/completions", {"x-request-id": request_id}
    thread = threading.Thread(target=lambda: httpx.post(url, json=body, headers=headers, timeout=60))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def place(server: Served, request_id: str) -> dict[str, Any]:
    return dict(server.client.get(f"/v1/queue/{request_id}").json())


def test_a_request_from_the_queue_to_its_end(serve: Serve) -> None:
    server = serve(FakeEngine(slots=1))
    server.engine.gate.clear()
    with asking(server, "first"):
        wait_for(lambda: server.service.stats().num_running == 1)
        with asking(server, "second"):
            wait_for(lambda: server.service.stats().num_waiting == 1)
            with asking(server, "third", n=2):
                wait_for(lambda: server.service.stats().num_waiting == 3)
                first, second, third = (place(server, name) for name in ("first", "second", "third"))
                assert (first["status"], first["position"], first["eta_s"]) == ("prefill", None, None)
                assert (second["id"], second["status"], second["position"]) == ("second", "waiting", 0)
                assert (third["status"], third["position"]) == ("waiting", 1)
                assert 0 < second["eta_s"] < third["eta_s"]
                assert second["prompt_tokens"] > 0 == second["output_tokens"]
                queue = server.client.get("/v1/queue")
                assert [entry["position"] for entry in queue.json()["entries"]] == [0, 1, 2]
                counts = {"waiting": 3, "running": 1, "slots": 1, "max_waiting": 8, "accepting": True}
                assert counts.items() <= queue.json().items()
                # Neither what is said nor the ids of others.
                assert CANARY not in queue.text
                assert "second" not in queue.text
                server.engine.gate.set()
    for name in ("first", "second", "third", "never"):
        response = server.client.get(f"/v1/queue/{name}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert server.client.get("/v1/queue").json()["entries"] == []


def test_the_slots(serve: Serve) -> None:
    server = serve(FakeEngine(reply=lambda _: "x" * 2000, slots=2, step_s=0.002))
    assert server.client.get("/slots").json() == [
        {"id": number, "status": "idle", "is_processing": False} for number in range(2)
    ]
    with asking(server, "first", max_tokens=300):
        wait_for(lambda: any(slot.get("output_tokens", 0) > 5 for slot in server.client.get("/slots").json()))
        response = server.client.get("/slots")
        (busy,) = [slot for slot in response.json() if slot["is_processing"]]
        assert busy["status"] == "decode"
        assert busy["prompt_tokens"] > 0
        assert busy["tokens_per_second"] > 0
        assert place(server, "first")["status"] == "decode"
        assert CANARY not in response.text
