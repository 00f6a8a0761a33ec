"""qwedge beside llama.cpp and onnxruntime-genai: the same weights, the same machine, taking turns.

``make bench-peers`` runs it (``ARGS="--model 1.5b --full"``). The first run fetches and builds the peers, which takes
some 20 minutes; they are kept in ``$QWEDGE_CACHE/bench`` (``~/.cache/qwedge/bench``). Prints a table and one JSON
line; progress goes to stderr. docs/benchmarks.md explains the method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from edge.bundle import WEIGHTS, read_manifest
from edge.errors import QwedgeError
from edge.machine import cpu_model, isa_features
from tests.bench.peers import models, report, tools
from tests.bench.peers.contestants import Contestant, Serving, field
from tests.bench.peers.meters import MOST_OTHERS, Meter, await_quiet
from tests.bench.peers.prompts import Reader
from tests.bench.peers.workloads import CONTEXT, FULL_ONLY, SLOTS, WORKLOADS, Stage

_INTERRUPTED = 130


def main() -> None:
    """Set up, measure, print."""
    options = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_INTERRUPTED))
    try:
        _run(options)
    except QwedgeError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _run(options: argparse.Namespace) -> None:
    home = models.home()
    build, python = tools.llama_cpp(home), tools.genai_python(home)
    made = models.prepare(models.CATALOG[options.model], build, python, options.bundle)
    reader = Reader(made.bundle)
    contestants = [one for one in field(made, build, python, reader) if options.only in one.name]
    if options.build_only:
        return
    log = home / "servers.log"
    log.unlink(missing_ok=True)
    about = _about(options, made, build, python)
    rounds: list[report.Round] = []
    began = time.monotonic()
    try:
        for number in range(options.rounds):
            rounds.append(_round(_rotated(contestants, number), reader, options, log))
            tools.tell(f"round {number + 1} of {options.rounds} done after {time.monotonic() - began:.0f} s")
    finally:
        # Also when it is interrupted: what was measured until then is worth having.
        if rounds:
            _print(about, rounds)


def _print(about: dict[str, Any], rounds: Sequence[report.Round]) -> None:
    found = report.rows(rounds, MOST_OTHERS)
    print(report.markdown(found))
    print(json.dumps({**about, **report.as_json(found, rounds)}), flush=True)


def _round(
    contestants: Sequence[Contestant], reader: Reader, options: argparse.Namespace, log: Path
) -> dict[str, report.Turn]:
    turns = {}
    for contestant in contestants:
        await_quiet(options.patience)
        # A folder for each turn: what outlives a restart must not outlive the round.
        with tempfile.TemporaryDirectory(prefix="qwedge-bench-") as state:
            serving = Serving(SLOTS, CONTEXT, options.threads, Path(state), log)
            turns[contestant.name] = _turn(contestant, serving, reader, options.workload)
    return turns


def _turn(contestant: Contestant, serving: Serving, reader: Reader, workloads: Sequence[str]) -> report.Turn:
    turn = report.Turn()
    stage = Stage(contestant, serving, reader)
    try:
        for name in workloads:
            meter = Meter()
            try:
                figures = WORKLOADS[name](stage)
            except (QwedgeError, httpx.HTTPError) as error:
                # One that fails must not cost the others their figures; the next workload starts it anew.
                stage.close()
                turn.failures[name] = str(error)
                tools.tell(f"{contestant.name}: {name} failed: {error}")
                continue
            turn.figures |= figures
            turn.others[name] = meter.others()
            tools.tell(f"{contestant.name}: {_brief(figures)} (others {turn.others[name]:.0%})")
    finally:
        stage.close()
    return turn


def _rotated(contestants: list[Contestant], by: int) -> list[Contestant]:
    start = by % len(contestants)
    return contestants[start:] + contestants[:start]


def _brief(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items()) or "nothing"


def _about(options: argparse.Namespace, made: models.Models, build: tools.LlamaCpp, python: Path) -> dict[str, Any]:
    """What the figures depend on."""
    manifest = read_manifest(made.bundle)
    return {
        "commit": _commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": isa_features(),
        "machine": platform.machine(),
        "model": manifest.name,
        "recipe": manifest.recipe,
        "weights_sha256": next(entry.sha256 for entry in manifest.files if entry.path == WEIGHTS),
        "weight_bytes_per_token": manifest.weight_bytes_per_token,
        "settings": {name: value for name, value in os.environ.items() if name.startswith("QWEDGE_")},
        "threads": options.threads,
        "slots": SLOTS,
        "context": CONTEXT,
        "llama_cpp": {"package": tools.LLAMA_CPP, "options": build.options},
        "genai": {"packages": tools.GENAI, **models.describe_genai(python, made.genai)},
    }


def _commit() -> str:
    command: list[str | Path] = ["git", "-C", models.ROOT, "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode().strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=models.CATALOG, default="0.5b", help="Qwen2.5-Coder of this size")
    add("--bundle", type=Path, help="a bundle of the same checkpoint, instead of the default recipe's")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--workload", action="append", choices=WORKLOADS, help="only this one; may be repeated")
    add("--full", action="store_true", help=f"also {', '.join(sorted(FULL_ONLY))}")
    add("--only", default="", metavar="TEXT", help="only contestants with TEXT in their names")
    add("--patience", type=float, default=5.0, help="seconds to wait for a quiet machine before each turn")
    add("--build-only", action="store_true", help="set everything up and measure nothing")
    options = parser.parse_args()
    left_out = frozenset() if options.full else FULL_ONLY
    chosen = options.workload or [name for name in WORKLOADS if name not in left_out]
    options.workload = [name for name in WORKLOADS if name in chosen]
    return options


if __name__ == "__main__":
    main()
