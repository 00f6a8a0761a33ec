"""How long `qwedge serve` takes from its start to the first token over HTTP, and how much memory it takes then.

    .venv/bin/python -m tests.bench.cold_start BUNDLE [--runs 7] [--tokens 1000]

Each run starts a fresh server on a free port with the bundle in the page cache, waits for the ready line, asks for one
token and ends the server. CPU seconds stand beside wall seconds: they say what a run cost where others used the machine
too. With --tokens the last server goes on answering, on all slots, and its memory is read once more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.peers.meters import warm_page_cache

_PATIENCE_S = 120
_TOKENS_PER_ANSWER = 125
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MEMORY = ("VmHWM", "RssAnon", "RssFile", "RssShmem")


@dataclass(frozen=True)
class Clock:
    """Seconds since the process was started."""

    wall_s: float
    cpu_s: float
    """User and system time of all its threads."""


@dataclass(frozen=True)
class ColdStart:
    """One start."""

    ready: Clock
    first_token: Clock
    memory_mb: dict[str, float]
    """After the first token, in MB (10^6 bytes), by the kernel's names."""


class Server:
    """A `qwedge serve` that runs.

    Args:
        process: the process, its ready line not read yet.
        begin: ``time.perf_counter()`` just before it was started.

    Raises:
        RuntimeError: it ended before it was ready.
    """

    def __init__(self, process: subprocess.Popen[str], begin: float) -> None:
        assert process.stdout is not None
        self._pid = process.pid
        self._begin = begin
        found = re.match(r"ready: .* at (http://\S+)", process.stdout.readline())
        if found is None:
            raise RuntimeError("the server did not start; its stderr says why")
        self._url = found[1]

    def clock(self) -> Clock:
        """What has passed so far."""
        fields = Path(f"/proc/{self._pid}/stat").read_text("ascii").rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # utime and stime
        return Clock(time.perf_counter() - self._begin, ticks / _TICKS_PER_S)

    def memory_mb(self) -> dict[str, float]:
        """Resident memory now by kind, and its peak."""
        lines = (line.split() for line in Path(f"/proc/{self._pid}/status").read_text("ascii").splitlines())
        return {key[:-1]: int(rest[0]) * 1024 / 1e6 for key, *rest in lines if key[:-1] in _MEMORY}

    def complete(self, prompt: str, max_tokens: int) -> int:
        """Continue a text; gives the number of tokens."""
        body = json.dumps({"prompt": prompt, "max_tokens": max_tokens}).encode()
        request = urllib.request.Request(f"{self._url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_PATIENCE_S) as response:
            answer: dict[str, Any] = json.load(response)
        tokens: int = answer["usage"]["completion_tokens"]
        return tokens


@contextmanager
def server(bundle: Path, *, slots: int) -> Iterator[Server]:
    """A server on a free port, ended with the block."""
    command = [sys.executable, "-m", "edge.cli", "serve", "--bundle", str(bundle), "--port", "0", "--slots", str(slots)]
    begin = time.perf_counter()
    with subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Server(process, begin)
        finally:
            process.send_signal(signal.SIGTERM)


def start(running: Server) -> ColdStart:
    """The figures of a server that has just become ready."""
    ready = running.clock()
    running.complete("Hello", max_tokens=1)
    return ColdStart(ready, running.clock(), running.memory_mb())


def generate(running: Server, tokens: int, *, slots: int) -> None:
    """Generate at least so many tokens on all slots at once, each answer to a prompt of its own."""
    done = number = 0
    with ThreadPoolExecutor(slots) as pool:
        while done < tokens:
            prompts = [f"{number + slot}. A story of {number + slot} brave machines begins" for slot in range(slots)]
            done += sum(pool.map(running.complete, prompts, [_TOKENS_PER_ANSWER] * slots))
            number += slots


def main() -> None:
    """Print the smallest and the middle wall and CPU seconds of the runs, then everything as one JSON line."""
    parser = argparse.ArgumentParser(description="Cold start and memory of `qwedge serve`.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=0, help="generate so many at the end and read the memory again")
    wanted = parser.parse_args()
    warm_page_cache(wanted.bundle)
    starts: list[ColdStart] = []
    memory: dict[str, float] = {}
    for run in range(wanted.runs):
        with server(wanted.bundle, slots=wanted.slots) as running:
            starts.append(start(running))
            if wanted.tokens and run == wanted.runs - 1:
                generate(running, wanted.tokens, slots=wanted.slots)
                memory = running.memory_mb()
    _report(starts, memory)


def _report(starts: list[ColdStart], memory: dict[str, float]) -> None:
    for label in ("ready", "first_token"):
        clocks: list[Clock] = [getattr(each, label) for each in starts]
        wall, cpu = sorted(clock.wall_s for clock in clocks), sorted(clock.cpu_s for clock in clocks)
        middle = len(starts) // 2
        print(
            f"{label}: wall {wall[0]:.2f} s (median {wall[middle]:.2f}), CPU {cpu[0]:.2f} s (median {cpu[middle]:.2f})"
        )
    for label, amounts in (("first token", starts[-1].memory_mb), ("all tokens", memory)):
        if amounts:
            print(f"memory after {label}, MB:", ", ".join(f"{key} {amounts[key]:.0f}" for key in _MEMORY))
    print(json.dumps({"starts": [asdict(each) for each in starts], "memory_mb": memory}))


if __name__ == "__main__":
    main()
