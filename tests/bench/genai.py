"""How fast is the int4 bundle beside onnxruntime-genai's own int4 export of the same checkpoint?

Usage: ``.venv/bin/python tests/bench/genai.py --bundle models/qwen2.5-coder-0.5b-instruct-int4``

Every run is a process of its own that loads the model, warms up, prefills one prompt and decodes. The two sides take
turns, so that whatever slows the machine slows both; ratios are taken within a pair. A pair in which other processes
took more than a tenth of the machine is not counted, whatever it shows. Prints a table, and one JSON line with all
of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from contestant import Job, others_busy
from peer import BUILDER_OPTIONS, Peer, describe_recipe, set_up_peer

from edge.bundle import WEIGHTS, verify_bundle
from edge.commands.machine import cpu_model

ROOT = Path(__file__).parents[2]
DEMO = "qwen2.5-coder-0.5b-instruct"
PLAIN_IDS = 151_643
"""Prompts are drawn from the ids below Qwen's special tokens."""
MOST_OTHERS = 0.1
"""Share of the machine that others may take in a run that counts."""
LONG_ANSWER = 1000
TARGETS = {"prefill_tokens_per_second": 1.1, "decode_tokens_per_second": 0.95}
_QUIET_S = 2.0
_SIDES = ("qwedge", "genai")

Run = dict[str, Any]


class Arena:
    """The two sides, and how to run either."""

    def __init__(self, bundle: Path, peer: Peer, patience_s: float) -> None:
        here = Path(__file__).parent
        self._commands: dict[str, tuple[str | Path, Path, Path]] = {
            "qwedge": (sys.executable, here / "run_qwedge.py", bundle),
            "genai": (peer.python, here / "run_genai.py", peer.model),
        }
        self._order = list(_SIDES)
        self._patience_s = patience_s

    def pair(self, job: Job) -> dict[str, Run]:
        """Both sides, one after the other, once the machine is quiet; the other one first the next time."""
        self._await_quiet()
        self._order.reverse()
        return {side: self.run(side, job) for side in self._order}

    def run(self, side: str, job: Job) -> Run:
        """One run in a process of its own."""
        python, script, model = self._commands[side]
        command: list[str | Path] = [python, script, replace(job, model=str(model)).to_json()]
        load_average = os.getloadavg()[0]
        result: Run = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return {**result, "load_average": load_average}

    def _await_quiet(self) -> None:
        deadline = time.monotonic() + self._patience_s
        while others_busy(_QUIET_S) > MOST_OTHERS and time.monotonic() < deadline:
            pass


def compare(arena: Arena, job: Job, rounds: int) -> tuple[list[dict[str, Run]], int]:
    """Pairs that count, after one that warms up, and how many were disturbed.

    Raises:
        SystemExit: the machine is too busy for ``rounds`` quiet pairs.
    """
    arena.pair(job)
    pairs: list[dict[str, Run]] = []
    disturbed = 0
    while len(pairs) < rounds:
        pair = arena.pair(job)
        quiet = all(disturbance(run) <= MOST_OTHERS for run in pair.values())
        pairs += [pair] if quiet else []
        disturbed += not quiet
        print(f"pair {len(pairs)} of {rounds}{'' if quiet else ' was disturbed'}: {_brief(pair)}", file=sys.stderr)
        if disturbed > 5 * rounds:
            sys.exit("error: other processes keep this machine busy\nhint: run it again when they are done")
    return pairs, disturbed


def disturbance(run: Run) -> float:
    """The larger share of the machine that others took while a run was prefilling or decoding."""
    return float(max(run["prefill"]["others"], run["decode"]["others"]))


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def summarize(pairs: list[dict[str, Run]]) -> dict[str, Any]:
    """By metric: both sides, and qwedge's ratio to the peer within each pair."""
    metrics = {}
    for name, target in TARGETS.items():
        sides = {side: summary(pair[side][name] for pair in pairs) for side in _SIDES}
        ratio = summary(pair["qwedge"][name] / pair["genai"][name] for pair in pairs)
        metrics[name] = {**sides, "ratio": ratio, "target": target, "met": ratio["median"] >= target}
    load = {side: summary(pair[side]["load"]["wall_s"] for pair in pairs) for side in _SIDES}
    return {**metrics, "load_s": load}


def table(result: Run) -> str:
    """The result for people."""
    lines = [f"{'':<26}{'qwedge':>22}{'onnxruntime-genai':>22}{'ratio':>22}  target"]
    for name in TARGETS:
        row = result["speed"][name]
        cells = "".join(f"{_spread(row[column]):>22}" for column in (*_SIDES, "ratio"))
        lines.append(f"{name.replace('_tokens_per_second', ', tokens/s'):<26}{cells}  {row['target']:.2f}")
    lines.append(_row("load, s", (result["speed"]["load_s"][side]["median"] for side in _SIDES)))
    for kind in ("rss", "peak", "anonymous"):
        label = f"{kind} after {LONG_ANSWER} tokens, MB"
        lines.append(_row(label, (result["long"][side]["memory_mb"][kind] for side in _SIDES)))
    return "\n".join(lines)


def main() -> None:
    """Set up, compare, print."""
    options = _arguments()
    manifest = verify_bundle(options.bundle)
    peer = set_up_peer(options.source)
    arena = Arena(options.bundle, peer, options.patience)
    job = Job("", options.prompt_tokens, options.output_tokens, options.threads, seed=1, vocab_size=PLAIN_IDS)
    pairs, disturbed = compare(arena, job, options.rounds)
    result = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "bundle": {entry.path: entry.sha256 for entry in manifest.files}[WEIGHTS],
        "recipe": manifest.recipe,
        "peer": {"builder_options": BUILDER_OPTIONS, **describe_recipe(peer)},
        "job": json.loads(job.to_json()),
        "disturbed_pairs": disturbed,
        "speed": summarize(pairs),
        "long": arena.pair(replace(job, output_tokens=LONG_ANSWER)),
        "pairs": pairs,
    }
    print(table(result))
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", type=Path, default=ROOT / f"models/{DEMO}-int4", help="an int4 bundle of the source")
    add("--source", default=DEMO, help="the checkpoint: a catalog name, folder, hub id or GGUF file")
    add("--rounds", type=int, default=7, help="pairs that count")
    add("--prompt-tokens", type=int, default=512)
    add("--output-tokens", type=int, default=128)
    add("--threads", type=int, default=2)
    add("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine before each pair")
    return parser.parse_args()


def _commit() -> str:
    command: list[str | Path] = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode().strip()


def _brief(pair: dict[str, Run]) -> str:
    return ", ".join(
        f"{side} {run['prefill_tokens_per_second']:.0f} and {run['decode_tokens_per_second']:.1f} tokens/s"
        f" (others {disturbance(run):.0%})"
        for side, run in pair.items()
    )


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f}-{values['max']:.2f})"


def _row(label: str, values: Iterable[float]) -> str:
    return f"{label:<26}" + "".join(f"{value:>22.2f}" for value in values)


if __name__ == "__main__":
    main()
