"""What HTTP adds to the engine, and how it holds up: first token, streaming, many clients at once, health, memory.

    python -m tests.bench.http_load                     # a fake engine at a fixed pace: the front end's own cost
    python -m tests.bench.http_load --bundle DIR        # a real model

The clients and the health probe are processes of their own, so that their work does not count as the server's. It
prints one JSON line. ``first_token_added_ms`` and ``streaming_ratio`` compare one streaming client with the service
alone, which gets a prepared request: HTTP's side includes the network, JSON, the template and tokenizing. Under
``load`` a number of clients stream at once while ``/health`` is asked fifty times a second; ``events_missing`` counts
tokens that did not arrive as an event of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edge.commands.loading import load
from edge.config import load_settings
from edge.openai import parse_chat, prepare
from edge.service import Delta, Event, Failed, Finished, Service
from edge.settings.server import ServerSettings
from tests.fakes import FakeEngine, make_service
from tests.serving import serving

PROBE_S = 0.02
PROMPT = "Count from one to a thousand, in words."


@dataclass(frozen=True)
class Sample:
    """One stream, in seconds from sending."""

    first: float
    """To the first token."""
    end: float
    num_events: int = 0
    """With a token's text or the end."""
    complete: bool = True
    """Whether ``[DONE]`` came, under one id."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="serve this one instead of the fake engine")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30, help="of one client, each way")
    parser.add_argument("--load-rounds", type=int, default=3, help="of all clients; memory is compared after the first")
    parser.add_argument("--step-ms", type=float, default=20.0, help="pace of the fake engine")
    options = parser.parse_args()
    with making(options) as service, serving(service, ServerSettings(port=0)) as (_host, port):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            figures = {"one_client": compare(service, port, options, pool), "load": stress(port, options, pool)}
    machine = {"machine": platform.processor() or platform.machine(), "cpus": psutil.cpu_count()}
    print(json.dumps({**machine, **vars(options), **figures}, default=str))


@contextmanager
def making(options: argparse.Namespace) -> Iterator[Service]:
    """The service, not started yet."""
    if options.bundle is None:
        engine = FakeEngine(lambda _: "x" * options.tokens, step_s=options.step_ms / 1000, slots=options.clients)
        yield make_service(engine, max_queue=options.clients)
    else:
        yield load(
            load_settings(None, {}, {"model.bundle": str(options.bundle), "scheduler.max_queue": options.clients})
        )


def body(options: argparse.Namespace) -> dict[str, Any]:
    """What all ask."""
    messages = [{"role": "user", "content": PROMPT}]
    return {
        "messages": messages,
        "max_tokens": options.tokens,
        "temperature": 0,
        "ignore_eos": options.bundle is not None,
    }


def compare(service: Service, port: int, options: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, float]:
    """The service alone and one HTTP client, in turns."""
    asked = json.dumps(body(options) | {"stream": True}).encode()
    alone, http, cpu = [], [], [0.0, 0.0]
    ask_service(service, options)
    pool.submit(streams, port, asked, 1).result()
    for _ in range(options.rounds):
        before = time.process_time()
        alone.append(ask_service(service, options))
        between = time.process_time()
        http += pool.submit(streams, port, asked, 1).result()
        cpu[0] += between - before
        cpu[1] += time.process_time() - between
    streaming = [statistics.median(sample.end - sample.first for sample in samples) for samples in (alone, http)]
    first = [statistics.median(sample.first for sample in samples) * 1000 for samples in (alone, http)]
    return {
        "first_token_alone_ms": round(first[0], 3),
        "first_token_http_ms": round(first[1], 3),
        "first_token_added_ms": round(first[1] - first[0], 3),
        "streaming_ratio": round(streaming[1] / streaming[0], 4),
        "cpu_us_per_event_added": round((cpu[1] - cpu[0]) / (options.rounds * options.tokens) * 1e6, 1),
    }


def ask_service(service: Service, options: argparse.Namespace) -> Sample:
    """One request without HTTP."""
    (request,) = prepare(service.model, parse_chat(body(options)))
    times: list[float] = []
    ended = threading.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, Delta):
            times.append(time.monotonic())
        elif isinstance(event, Finished | Failed):
            times.append(time.monotonic())
            ended.set()

    sent_at = time.monotonic()
    service.submit(request, on_event)
    assert ended.wait(600)
    return Sample(times[0] - sent_at, times[-1] - sent_at)


def stress(port: int, options: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """All clients at once, some times over, with health asked all the while."""
    asked = json.dumps(body(options) | {"stream": True}).encode()
    process = psutil.Process()
    samples: list[Sample] = []
    health: list[float] = []
    rss: list[int] = []
    for _ in range(options.load_rounds):
        probing = pool.submit(probe, port)
        samples += pool.submit(streams, port, asked, options.clients).result()
        health += probing.result()
        rss.append(process.memory_info().rss)
    missing = sum(max(0, options.tokens - sample.num_events) for sample in samples)
    return {
        "streams": len(samples),
        "complete": sum(sample.complete for sample in samples),
        "events_missing": missing,
        "events_per_s": round(sum(s.num_events for s in samples) / sum(max_end(samples, options.clients)), 1),
        "health_samples": len(health),
        "health_p50_ms": round(statistics.median(health) * 1000, 2),
        "health_p99_ms": round(statistics.quantiles(health, n=100)[98] * 1000, 2),
        "rss_after_first_mb": round(rss[0] / 1e6, 1),
        "rss_after_last_mb": round(rss[-1] / 1e6, 1),
    }


def max_end(samples: list[Sample], clients: int) -> list[float]:
    """How long each round took."""
    return [max(sample.end for sample in samples[i : i + clients]) for i in range(0, len(samples), clients)]


# --- the clients' processes ------------------------------------------------------------------------------------------


def streams(port: int, asked: bytes, number: int) -> list[Sample]:
    """Ask so many times at once and read all streams to their ends."""

    async def run() -> list[Sample]:
        return await asyncio.gather(*(_stream(port, asked) for _ in range(number)))

    return asyncio.run(run())


async def _stream(port: int, asked: bytes) -> Sample:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(asked)}\r\n\r\n"
    sent_at = time.monotonic()
    writer.write(head.encode() + asked)
    first, num_events, done, ids = 0.0, 0, False, set()
    while not done:
        line = await reader.readline()
        if not line:
            break
        if not line.startswith(b"data: "):
            continue
        done = line.startswith(b"data: [DONE]")
        if done or not (chunk := json.loads(line[6:])).get("choices"):
            continue
        ids.add(chunk["id"])
        if chunk["choices"][0]["delta"].get("content"):
            num_events += 1
            first = first or time.monotonic() - sent_at
    end = time.monotonic() - sent_at
    writer.close()
    return Sample(first, end, num_events, complete=done and len(ids) == 1)


def probe(port: int) -> list[float]:
    """Seconds that ``/health`` takes, asked on one connection until the load is gone."""
    return asyncio.run(_probe(port))


async def _probe(port: int) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds: list[float] = []
    loaded, idle_since = False, time.monotonic()
    while (not loaded and time.monotonic() - idle_since < 30) or (loaded and time.monotonic() - idle_since < 0.5):
        before = time.monotonic()
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        queue = json.loads(await reader.readexactly(length))["queue"]
        if queue["running"]:
            loaded, idle_since = True, time.monotonic()
            seconds.append(time.monotonic() - before)
        await asyncio.sleep(PROBE_S)
    writer.close()
    return seconds


if __name__ == "__main__":
    main()
