"""What both sides of the comparison share: the job, the measured run, and the meters around it.

Runs in the environment of either side, so it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

_WARM_UP_PROMPT, _WARM_UP_TOKENS = 64, 8
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Job:
    """One measured run of one contestant."""

    model: str
    """Folder."""
    prompt_tokens: int
    output_tokens: int
    """Tokens decoded after the first one, which belongs to the prefill."""
    threads: int
    seed: int
    vocab_size: int

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The job that :meth:`to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    def prompt(self) -> list[int]:
        """The same token ids for every contestant."""
        source = random.Random(self.seed)
        return [source.randrange(self.vocab_size) for _ in range(self.prompt_tokens)]


class Contestant(Protocol):
    """A runtime with its model loaded, decoding greedily and never stopping at an eos id."""

    def first(self, prompt_ids: Sequence[int], output_tokens: int) -> int:
        """Begin a new sequence that will be ``output_tokens`` longer: prefill and choose the first token."""
        ...

    def following(self) -> int:
        """One decode step: the next token."""
        ...

    def versions(self) -> dict[str, str]:
        """Of the libraries that do the work."""
        ...


class Meter:
    """Wall time, own CPU time and the CPU time of everybody else, since it was made."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._own = time.process_time()
        self._machine = _machine_busy_s()

    def read(self) -> dict[str, float]:
        """wall_s, cpu_s, and ``others``: the share of the machine's cores that other processes took."""
        wall = time.perf_counter() - self._wall
        own = time.process_time() - self._own
        foreign = _machine_busy_s() - self._machine - own
        return {"wall_s": wall, "cpu_s": own, "others": max(0.0, foreign / (wall * _cores()))}


def main(load: Callable[[Job], Contestant]) -> None:
    """Run the job given as the only argument and print what was measured as one JSON line."""
    job = Job.from_json(sys.argv[1])
    print(json.dumps(measure(job, load)))


def measure(job: Job, load: Callable[[Job], Contestant]) -> dict[str, Any]:
    """Load, warm up, prefill, decode; the memory after each."""
    clock = Meter()
    contestant = load(job)
    loading, loaded_mb = clock.read(), memory_mb()
    prompt = job.prompt()
    generate(contestant, prompt[:_WARM_UP_PROMPT], _WARM_UP_TOKENS)
    clock = Meter()
    tokens = [contestant.first(prompt, job.output_tokens)]
    prefill = clock.read()
    clock = Meter()
    tokens += [contestant.following() for _ in range(job.output_tokens)]
    decode = clock.read()
    return {
        "prefill_tokens_per_second": job.prompt_tokens / prefill["wall_s"],
        "decode_tokens_per_second": job.output_tokens / decode["wall_s"],
        "load": loading,
        "prefill": prefill,
        "decode": decode,
        "loaded_mb": loaded_mb,
        "memory_mb": memory_mb(),
        "first_tokens": tokens[:8],
        "versions": contestant.versions(),
    }


def generate(contestant: Contestant, prompt: Sequence[int], output_tokens: int) -> None:
    """One sequence from beginning to end, unmeasured."""
    contestant.first(prompt, output_tokens)
    for _ in range(output_tokens):
        contestant.following()


def memory_mb() -> dict[str, float]:
    """Resident memory of this process in MB (10^6 bytes): now, its peak, and how much of it no file backs."""
    names = {"VmRSS": "rss", "VmHWM": "peak", "RssAnon": "anonymous"}
    lines = (line.split() for line in Path("/proc/self/status").read_text("ascii").splitlines())
    return {names[key[:-1]]: int(rest[0]) * 1024 / 1e6 for key, *rest in lines if key[:-1] in names}


def others_busy(seconds: float) -> float:
    """Share of the machine's cores that is busy while this process sleeps for ``seconds``."""
    meter = Meter()
    time.sleep(seconds)
    return meter.read()["others"]


def _machine_busy_s() -> float:
    """CPU seconds of all processes since boot, stolen time included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
        int(field) for field in Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def _cores() -> int:
    return os.cpu_count() or 1
