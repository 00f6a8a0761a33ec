"""The wall clock jumps by up to thirty years, forth and back, under a whole server with HTTP, MQTT and its broker.

    python -m tests.faults.clock_jumps --rounds 10

A preload (clock_shift.c, built by whatever C compiler is there) shifts CLOCK_REALTIME of the server and its mosquitto;
the monotonic clock and the client's clocks stay. In each round the clock jumps while a request with a long deadline
runs, which must not end early, and while one with a short deadline runs, which must not end late. What was answered at
first must be known to the end, also by a server that is started anew under a wrong clock; the link to the broker must
never be lost, and the watchdog be fed all the time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import httpx

from edge.settings.mqtt import BrokerAddress
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.edge.mqtt.client import Client
from tests.export import tiny

ROOT: Final = Path(__file__).parents[2]
COMPILERS: Final = (("tcc", "-shared", "-nostdlib"), ("cc", "-shared", "-fPIC", "-nostdlib"))
DEVICE: Final = "edge-7"
YEARS_S: Final = 30 * 365 * 86_400
TIMEOUT_S: Final = 60.0
LONG_MS: Final = 120_000
SHORT_MS: Final = 500
WATCHDOG_S: Final = 2.0
LONG_TOKENS: Final = 150
CONTEXT: Final = 16_384
NEVER_STOP: Final = {str(tiny.EOS): -100, str(tiny.BOS): -100}


def obstacle() -> str | None:
    """Why this cannot run here; None where it can."""
    if shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        return "no mosquitto"
    if _compiler() is None:
        return "no C compiler: apt-get install tcc"
    return None if os.uname().machine in {"x86_64", "aarch64"} else "the preload does not know this processor"


def _compiler() -> tuple[str, ...] | None:
    return next((line for line in COMPILERS if shutil.which(line[0])), None)


class Clock:
    """The wall clock of processes that have :attr:`environment`."""

    def __init__(self, folder: Path) -> None:
        compiler = _compiler()
        assert compiler is not None
        self._file, library = folder / "shift", folder / "clock_shift.so"
        subprocess.run([*compiler, "-o", library, Path(__file__).with_name("clock_shift.c")], check=True)
        self.set(0)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(self._file)}

    def set(self, seconds: int) -> None:
        """Jump; in place, since the file is mapped."""
        mode = "r+b" if self._file.exists() else "wb"
        with self._file.open(mode) as file:
            file.write(struct.pack("l", seconds))


@dataclass
class Watchdog:
    """systemd's side of the watchdog: when it was fed."""

    sock: socket.socket
    fed: list[float] = field(default_factory=list)

    def listen(self) -> None:
        """Until the socket is closed."""
        while message := self.sock.recv(4096):
            if b"WATCHDOG=1" in message:
                self.fed.append(time.monotonic())
            if message == b"END":
                return

    def longest_gap_s(self) -> float:
        """Seconds between two feedings."""
        return max((later - sooner for sooner, later in pairwise(self.fed)), default=0.0)


@dataclass
class Server:
    """A server under the clock."""

    process: subprocess.Popen[str]
    url: str
    broker: BrokerAddress


@contextmanager
def serving(folder: Path, clock: Clock, notify: Path) -> Iterator[Server]:
    """Serve until the block ends, which asks it to leave."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QWEDGE_")}
    environment |= {**clock.environment, "STATE_DIRECTORY": str(folder / "state"), "QWEDGE_MQTT_PORT": "0"}
    environment |= {"QWEDGE_MQTT_DEVICE": DEVICE, "NOTIFY_SOCKET": str(notify)}
    environment |= {"WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
    line = [sys.executable, "-m", "edge.cli", "serve", "--bundle", str(folder / "bundle"), "--port", "0"]
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(
            [*line, "--broker", "embedded", "--threads", "1"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ready = process.stdout.readline().split()
            assert ready, (folder / "log").read_text()
            host, port = ready[-1].removeprefix("mqtt://").split(":")
            yield Server(process, ready[-3], BrokerAddress(host, int(port)))
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


def body(tokens: int) -> dict[str, Any]:
    """A request that makes so many tokens."""
    return {"prompt": "hello", "max_tokens": tokens, "logit_bias": NEVER_STOP, "temperature": 1.0}


@dataclass
class Figures:
    """What was seen."""

    early: int = 0
    """Requests with time left that did not get their answer."""
    late_s: float = 0.0
    """The longest that a request went on after its deadline."""
    before_s: float = 0.0
    """The most that a request ended before its deadline."""
    forgotten: int = 0
    """Answers that were not known any more."""
    lost_links: int = 0
    uptime_wrong: int = 0
    unmoved: int = 0
    """Jumps that the server's clock did not make: then nothing was tested."""


def jump_while_long(client: Client, clock: Clock, number: int, shift: int, figures: Figures) -> None:
    """A request with minutes to go runs on over the jump."""
    client.send(f"long-{number}", {"v": 1, "body": body(LONG_TOKENS), "deadline_ms": LONG_MS})
    client.event(f"long-{number}", "started")
    clock.set(shift)
    figures.early += client.done(f"long-{number}").status != 200


def jump_while_short(client: Client, clock: Clock, number: int, shift: int, figures: Figures) -> None:
    """A request that cannot be ready in time ends when its time is over."""
    began = time.monotonic()
    client.send(f"short-{number}", {"v": 1, "body": body(CONTEXT - 100), "deadline_ms": SHORT_MS})
    clock.set(shift)
    outcome = client.done(f"short-{number}")
    over = time.monotonic() - began - SHORT_MS / 1000
    assert outcome.status == 408, outcome
    figures.late_s, figures.before_s = max(figures.late_s, over), max(figures.before_s, -over)


def replayed(server: Server, client: Client, number: int) -> tuple[Any, Any]:
    """The same two requests as ever, over MQTT for the n-th time in this process and over HTTP with a key."""
    client.send("first", {"v": 1, "body": body(8)})
    key = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
    over_http = httpx.post(f"{server.url}/v1/completions", json=body(8), headers=key, timeout=TIMEOUT_S)
    assert over_http.status_code == 200, over_http.text
    return client.done("first", number).body["choices"], over_http.json()["choices"]


def wall_clock(server: Server) -> float:
    """What the server takes for the time of day."""
    return float(httpx.post(f"{server.url}/v1/completions", json=body(1), timeout=TIMEOUT_S).json()["created"])


def campaign(rounds: int, seed: int) -> dict[str, float]:
    """Let the clock jump ``2 * rounds`` times while a server runs, and start another one under a wrong clock."""
    print(f"seed {seed}", flush=True)
    chance, figures = random.Random(seed), Figures()
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        with open_checkpoint(
            tiny.write_folder(folder / "checkpoint", tiny.qwen2_config(max_position_embeddings=CONTEXT))
        ) as source:
            export_bundle(source, folder / "bundle", RECIPES["fp32"], name="tiny", progress=Silent())
        clock = Clock(folder)
        watchdog = stack.enter_context(_watchdog(folder / "notify"))
        with serving(folder, clock, folder / "notify") as server:
            first = _rounds(server, clock, rounds, chance, figures)
        gap = watchdog.longest_gap_s()
        for shift in (-YEARS_S, YEARS_S)[:rounds]:
            clock.set(shift)
            with serving(folder, clock, folder / "notify") as server, _client(server) as client:
                figures.forgotten += replayed(server, client, 1) != first
    return {"seed": seed, "rounds": rounds, **vars(figures), "watchdog_gap_s": round(gap, 1)}


def _rounds(server: Server, clock: Clock, rounds: int, chance: random.Random, figures: Figures) -> tuple[Any, Any]:
    began = time.monotonic()
    with _client(server) as client:
        first = replayed(server, client, 1)
        for number in range(1, rounds + 1):
            shift = chance.choice((-1, 1)) * chance.randint(1, YEARS_S)
            jump_while_long(client, clock, number, shift, figures)
            jump_while_short(client, clock, number, -shift, figures)
            figures.forgotten += replayed(server, client, number + 1) != first
            figures.unmoved += abs(wall_clock(server) - time.time() + shift) > TIMEOUT_S
            uptime = httpx.get(f"{server.url}/v1/device", timeout=TIMEOUT_S).json()["uptime_s"]
            figures.uptime_wrong += not 0 <= uptime <= time.monotonic() - began + TIMEOUT_S
        states = [message.payload for message in client.received if message.topic.endswith("/status")]
        figures.lost_links += states != [b"online"]
    return first


@contextmanager
def _client(server: Server) -> Iterator[Client]:
    """A client that waits until the server hears requests: what comes before its first subscription reaches nobody."""
    with Client(server.broker, "watcher", DEVICE, extra=(f"qwedge/v1/dev/{DEVICE}/status",)) as client:
        client.wait(lambda: any(message.payload == b"online" for message in client.received))
        yield client


@contextmanager
def _watchdog(path: Path) -> Iterator[Watchdog]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        watchdog = Watchdog(sock)
        listener = threading.Thread(target=watchdog.listen)
        listener.start()
        try:
            yield watchdog
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
                own.sendto(b"END", str(path))
            listener.join()


def main() -> None:
    """Run the campaign and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(json.dumps(campaign(options.rounds, options.seed)))


if __name__ == "__main__":
    main()
