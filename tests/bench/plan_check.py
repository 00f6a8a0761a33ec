"""What `qwedge plan --here` predicts beside what is measured: speed, and the memory of a real server.

    .venv/bin/python -m tests.bench.plan_check BUNDLE [--rounds 5] [--prompt 512] [--output 128] [--memory-only]

Prediction and measurement take turns, each in a process of its own, since a machine's memory is faster at some times
than at others. A round in which other processes took more than a tenth of the machine is marked. Memory is that of
`qwedge serve` while several requests are being answered, at several numbers and lengths of sequences: anonymous memory
and the cache, sampled from smaps_rollup (PSS), against the prediction for just these lengths.

Prints Markdown tables and a JSON object with everything at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge.bundle import read_manifest
from edge.planning.graph_file import read_shape
from edge.planning.memory import Serving, predict_memory
from edge.planning.shape import Shape

_PATIENCE_S = 900
_SAMPLE_S = 0.05
_ANSWER = 96
"""Tokens of each answer in the memory's part: long enough for all sequences to be at work together."""
_PREFIX_BYTES = 64 << 20
CASES = ((1, 2048, 200), (1, 4096, 3000), (2, 2048, 900), (4, 2048, 1500), (8, 4096, 1000))
"""Slots, context, and tokens of the prompt of each sequence."""


@dataclass(frozen=True)
class Pair:
    """One figure of one round."""

    what: str
    predicted: float
    measured: float
    disturbed: bool = False

    @property
    def off(self) -> float:
        """How far the prediction is off, relative to the measurement."""
        return self.predicted / self.measured - 1


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--memory-only", action="store_true")
    options = parser.parse_args()
    shape = read_shape(options.bundle, read_manifest(options.bundle))
    memory: list[Pair] = []
    for case in CASES:
        memory += check_memory(options.bundle, shape, *case)
        print(_lines(memory[-2:]), flush=True, file=sys.stderr)
    print(_table(memory, "MB"), flush=True)
    speed: list[Pair] = []
    for _ in range(0 if options.memory_only else options.rounds):
        speed += check_speed(options.bundle, options.prompt, options.output)
    print(_table(speed, ""))
    print(_medians(speed))
    print(json.dumps({"memory": [asdict(pair) for pair in memory], "speed": [asdict(pair) for pair in speed]}))


def check_speed(bundle: Path, prompt: int, output: int) -> list[Pair]:
    """Predict, then measure at once."""
    with _others() as others:
        sizes = ["--prompt", str(prompt), "--output", str(output)]
        plan = _run("plan", str(bundle), "--here", "--slots", "1", *sizes)
        sizes = ["--prompt-tokens", str(prompt), "--output-tokens", str(output)]
        bench = _run("bench", "--bundle", str(bundle), *sizes)
    names = ("prefill_tokens_per_second", "decode_tokens_per_second")
    pairs = [(name, plan[name], bench[name]) for name in names]
    pairs.append(("first_token_ms", plan["first_token_s"] * 1e3, bench["ttft_ms"]))
    return [Pair(what, predicted, measured, disturbed=others[0] > 0.1) for what, predicted, measured in pairs]


def check_memory(bundle: Path, shape: Shape, slots: int, context: int, prompt: int) -> list[Pair]:
    """A server with all slots at work."""
    fills = [prompt + _ANSWER] * slots
    serving = Serving(context=context, slots=slots, prefix_bytes=_PREFIX_BYTES)
    predicted = predict_memory(shape, serving, fills=fills)
    with _server(bundle, slots, context) as (pid, url):
        loaded = _unreclaimable(pid)
        peak = _watch(pid, lambda: _ask_all(url, slots, prompt))
    name = f"{slots} x {prompt} + {_ANSWER} of {context}"
    return [
        Pair(f"loaded, {name}", predicted.loaded / 1e6, loaded / 1e6),
        Pair(f"at work, {name}", predicted.at_work / 1e6, peak / 1e6),
    ]


def _run(*args: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "edge.cli", *args, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=_PATIENCE_S)
    return dict(json.loads(done.stdout))


@contextmanager
def _server(bundle: Path, slots: int, context: int) -> Iterator[tuple[int, str]]:
    """A `qwedge serve` that is ready: its process and its address."""
    sizes = ["--slots", str(slots), "--context", str(context)]
    command = [sys.executable, "-m", "edge.cli", "serve", "--bundle", str(bundle), "--port", "0", *sizes]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.match(r"ready: .* at (http://\S+)", process.stdout.readline())
            if found is None:
                raise RuntimeError("the server did not start")
            yield process.pid, found[1]
        finally:
            process.send_signal(signal.SIGTERM)


def _ask_all(url: str, count: int, num_tokens: int) -> None:
    """Different prompts at once, each of so many tokens."""
    source = random.Random(1)
    words = ("alpha", "beta", "gamma", "delta", "word", "tree", "house", "blue", "run", "code")
    prompts = [" ".join(source.choice(words) for _ in range(num_tokens)) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda prompt: _ask(url, prompt), prompts))


def _ask(url: str, prompt: str) -> None:
    body = {"prompt": prompt, "max_tokens": _ANSWER, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=_PATIENCE_S) as response:
        response.read()


def _watch(pid: int, work: Any) -> int:
    """The most memory while something is done."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLE_S):
            peak[0] = max(peak[0], _unreclaimable(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return peak[0]


def _unreclaimable(pid: int) -> int:
    """Anonymous memory and the cache, in bytes; a page of the cache counts once, however many rows show it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    return found["Pss_Anon"] + found["Pss_Shmem"]


@contextmanager
def _others() -> Iterator[list[float]]:
    """Gives a list that holds, after the block, the share of the machine that others took in it."""
    result, before, began = [0.0], _busy_s(), time.perf_counter()
    mine = sum(os.times()[:4])
    yield result
    used = _busy_s() - before - (sum(os.times()[:4]) - mine)
    result[0] = used / ((time.perf_counter() - began) * (os.cpu_count() or 1))


def _busy_s() -> float:
    """Processor seconds of all processes since the machine was started."""
    user, nice, system = Path("/proc/stat").read_text("ascii").split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _table(pairs: Sequence[Pair], unit: str) -> str:
    head = f"| what | predicted {unit} | measured {unit} | off by | |\n|---|---|---|---|---|"
    return f"{head}\n{_lines(pairs)}"


def _lines(pairs: Sequence[Pair]) -> str:
    return "\n".join(
        f"| {pair.what} | {pair.predicted:,.1f} | {pair.measured:,.1f} | {pair.off:+.1%} |"
        f" {'disturbed' if pair.disturbed else ''} |"
        for pair in pairs
    )


def _medians(pairs: Sequence[Pair]) -> str:
    """Of the rounds that nobody disturbed; of all, where all were."""
    lines = []
    for what in dict.fromkeys(pair.what for pair in pairs):
        found = [pair for pair in pairs if pair.what == what]
        offs = sorted(pair.off for pair in [pair for pair in found if not pair.disturbed] or found)
        lines.append(f"{what}: median {statistics.median(offs):+.1%}, {offs[0]:+.1%} to {offs[-1]:+.1%} ({len(offs)})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
