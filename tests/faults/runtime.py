"""A device as a process of its own, to be killed: the real bridge and journal over an engine that never repeats itself.

    python -m tests.faults.runtime --port 1883 --device edge --journal DIR

It prints ``ready`` when it is connected.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.journal import Journal
from edge.mqtt import MqttBridge
from edge.settings.mqtt import BrokerAddress, MqttSettings
from tests.fakes import FakeEngine, last_user_message, make_service

ROOT = Path(__file__).parents[2]
POISON = "end the process"


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--step-ms", type=float, default=1.0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    service = make_service(FakeEngine(answer, slots=4, step_s=options.step_ms / 1000), max_queue=64)
    service.start()
    settings = MqttSettings(device=options.device, keepalive_s=5, pool="off")
    bridge = MqttBridge(service, settings, BrokerAddress("127.0.0.1", options.port), Journal(options.journal))
    bridge.start()
    while not bridge.connected:
        time.sleep(0.005)
    print("ready", flush=True)
    threading.Event().wait()


def answer(prompt: str) -> str:
    """Another one each time: two runs of a request show."""
    text = last_user_message(prompt)
    if POISON in text:
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{uuid.uuid4().hex[:8]} {text}"


@contextmanager
def runtime(
    port: int, device: str, journal: Path, log: Path, *, step_ms: float = 1.0
) -> Iterator[subprocess.Popen[str]]:
    """Start the process; it is connected when the block begins, and killed when it ends."""
    line = [sys.executable, "-m", "tests.faults.runtime", "--port", str(port), "--device", device]
    with log.open("a") as stderr:
        line += ["--journal", str(journal), "--step-ms", str(step_ms)]
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    try:
        with process.stdout:
            word = process.stdout.readline()
            assert word == "ready\n" or process.wait(10) < 0, log.read_text()[-2000:]
            yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
