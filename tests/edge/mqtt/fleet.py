"""Devices of a pool, each a process of its own with the fake engine: ``python -m tests.edge.mqtt.fleet --help``."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge.client import Client
from edge.mqtt import MqttBridge
from edge.settings.mqtt import BrokerAddress, MqttSettings
from tests.fakes import FakeEngine, make_service

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Speed:
    """How fast a device is."""

    step_s: float
    """Seconds of a token."""
    slots: int = 1


def answer(prompt: str) -> str:
    """As many characters, and so tokens, as the prompt's last word says."""
    return "x" * int(prompt.rsplit("<|im_end|>", 1)[0].rsplit(maxsplit=1)[-1])


def make_bridge(address: BrokerAddress, name: str, speed: Speed, *, root: str = "qwedge") -> MqttBridge:
    """A device that is in the pool; service and bridge are started."""
    service = make_service(FakeEngine(answer, step_s=speed.step_s, slots=speed.slots), max_queue=8)
    service.start()
    bridge = MqttBridge(service, MqttSettings(root=root, device=name, keepalive_s=5, pool="on"), address)
    bridge.start()
    return bridge


def start_worker(address: BrokerAddress, number: int, speed: Speed) -> subprocess.Popen[str]:
    """Start the process of the device ``worker-NUMBER``."""
    line = [sys.executable, "-m", "tests.edge.mqtt.fleet", str(address.port), f"worker-{number}"]
    return subprocess.Popen(
        [*line, str(speed.step_s), str(speed.slots)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_worker(worker: subprocess.Popen[str]) -> None:
    """Until it is in the pool."""
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"


def kill_worker(worker: subprocess.Popen[str]) -> None:
    """SIGKILL."""
    worker.kill()
    worker.communicate()


@contextmanager
def fleet(address: BrokerAddress, speeds: Sequence[Speed]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of devices ``worker-0``, ``worker-1``, ..., ready for requests; who replaces one may put it in."""
    workers = [start_worker(address, i, speed) for i, speed in enumerate(speeds)]
    try:
        for worker in workers:
            wait_for_worker(worker)
        yield workers
    finally:
        for worker in workers:
            kill_worker(worker)


def ask_at_once(client: Client, num_jobs: int, num_tokens: int, meanwhile: Callable[[], None]) -> float:
    """Ask for answers of equal length from as many threads; checks them and gives the seconds until the last one."""
    began = time.monotonic()
    with ThreadPoolExecutor(num_jobs) as threads:
        answers = [threads.submit(client.ask, f"{i}: {num_tokens}") for i in range(num_jobs)]
        meanwhile()
        assert [answer.result() for answer in answers] == ["x" * num_tokens] * num_jobs
    return time.monotonic() - began


def ideal_makespan_s(speeds: Sequence[Speed], num_jobs: int, num_tokens: int) -> float:
    """Seconds that the best split of the jobs takes, whole jobs to each slot."""
    # The prompt is one step, the token that ends the answer another.
    job_s = [speed.step_s * (num_tokens + 2) for speed in speeds for _ in range(speed.slots)]
    ends = [0.0] * len(job_s)
    for _ in range(num_jobs):
        first = min(range(len(job_s)), key=lambda i: ends[i] + job_s[i])
        ends[first] += job_s[first]
    return max(ends)


def main() -> None:
    """One device, until its stdin ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("name")
    parser.add_argument("step_s", type=float)
    parser.add_argument("slots", type=int)
    args = parser.parse_args()
    bridge = make_bridge(BrokerAddress("127.0.0.1", args.port), args.name, Speed(args.step_s, args.slots))
    ready = threading.Event()
    while not (bridge.connected and bridge.pool_member):
        ready.wait(0.02)
    print("ready", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.read()


if __name__ == "__main__":
    main()
