"""Many clients at once: nothing is lost, health answers meanwhile, and nothing is left behind."""

import json
import threading
from collections.abc import Callable

from tests.bench.http_load import probe, streams
from tests.fakes import FakeEngine
from tests.serving import Served, wait_for

Serve = Callable[..., Served]
NUM_CLIENTS = 64
NUM_TOKENS = 24


def test_64_streams_at_once(serve: Serve) -> None:
    server = serve(FakeEngine(lambda _: "x" * NUM_TOKENS, step_s=0.005, slots=8), max_queue=NUM_CLIENTS)
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": NUM_TOKENS, "stream": True}
    health: list[float] = []
    probing = threading.Thread(target=lambda: health.extend(probe(server.port)))
    probing.start()
    samples = streams(server.port, json.dumps(asked).encode(), NUM_CLIENTS)
    probing.join()
    assert [sample.num_events for sample in samples] == [NUM_TOKENS] * NUM_CLIENTS
    assert all(sample.complete for sample in samples)
    assert health
    wait_for(lambda: server.service.stats().num_running == 0)
    with server.connect() as sock:  # the connections were counted down again
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 200"
