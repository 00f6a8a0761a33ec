"""Power cuts while bundles are installed, switched, rolled back and removed: the old or the new one is always active.

    python -m tests.faults.store_power_cut --cuts 100

The store lies on an ext4 in a file. A process changes it without pause and says what it begins and what is done. At
random moments the raw file is copied, as a disk keeps what has been written and synced when the power fails, and the
copy is mounted: the active bundle must be one that had been switched to, or was being switched to, must verify to the
last byte, and the interrupted work must go on. Needs root and loop devices.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.bundle import GRAPH, WEIGHTS, verify_bundle
from edge.errors import BundleError
from edge.store import Installed, Store, open_source
from tests.edge.bundles import FILES, write_bundle
from tests.faults.power_cut import IMAGE_BYTES, cut_power, make_image, mounted, obstacle

ROOT = Path(__file__).parents[2]
PAUSE_S = (0.0, 0.2)
NUM_BUNDLES = 5


def main() -> None:
    """Run the campaign and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--work", nargs=3, metavar=("STORE", "SOURCES", "LOG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*map(Path, options.work), random.Random(options.seed))
    reason = obstacle()
    print(reason if reason is not None else json.dumps(campaign(options.cuts, options.seed)))


def campaign(cuts: int, seed: int) -> dict[str, int]:
    """Cut the power ``cuts`` times; says in how many of them what was found."""
    print(f"seed {seed}", flush=True)
    chance = random.Random(seed)
    figures = {"seed": seed, "cuts": cuts, "switches": 0, "cut_while_switching": 0, "cut_while_installing": 0}
    figures |= {"not_active": 0, "damaged": 0, "not_resumed": 0}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sources = [make_source(folder / "sources", number) for number in range(NUM_BUNDLES)]
        with mounted(make_image(folder / "image", IMAGE_BYTES), folder / "disk") as disk:
            log = folder / "log"
            with working(disk / "store", folder / "sources", log, seed) as process:
                while "done" not in read(log):
                    time.sleep(0.05)
                for _ in range(cuts):
                    time.sleep(chance.uniform(*PAUSE_S))
                    assert process.poll() is None, "the worker ended"
                    before = read(log).splitlines()
                    cut_power(process.pid, folder / "image", folder / "copy")
                    allowed = may_be_active(before, read(log).splitlines())
                    with mounted(folder / "copy", folder / "cut") as copy:
                        judge(Store(copy / "store"), allowed, sources, figures)
            figures["switches"] = read(log).count("done")
    return figures


def make_source(folder: Path, number: int) -> Path:
    """A bundle that shares its tokenizer with the others, and with every second one its weights."""
    weights = random.Random(number % 2).randbytes(3 << 20)
    files = {**FILES, GRAPH: f"graph {number}".encode(), WEIGHTS: weights, "own.bin": bytes([number]) * (1 << 20)}
    return write_bundle(folder / f"bundle{number}", files)


def judge(store: Store, allowed: set[str], sources: list[Path], figures: dict[str, int]) -> None:
    """Look at the store on a disk that lost its power."""
    figures["cut_while_switching"] += len(allowed) > 1
    figures["cut_while_installing"] += any((store.folder / "bundles").glob(".*.part*"))
    active = store.active()
    if active is None or active.name not in allowed:
        figures["not_active"] += 1
        return
    figures["damaged"] += not whole(active)
    figures["damaged"] += not all(whole(each) for each in store.list() if each.previous)
    installed = [store.install(open_source(source)) for source in sources]
    figures["not_resumed"] += not all(map(whole, installed))


def may_be_active(before: list[str], after: list[str]) -> set[str]:
    """Which bundles may be active, by what was told shortly before and after the cut.

    The one of the last switch that was done before, one of a switch that had begun, and those of switches since.
    """
    last = max(number for number, line in enumerate(before) if line.startswith("done"))
    return {line.split()[1] for line in after[last:]}


def whole(installed: Installed) -> bool:
    """Whether every byte is there."""
    try:
        return len(verify_bundle(installed.path).files) == len(FILES) + 1
    except BundleError as error:
        print(error, flush=True)
        return False


@contextmanager
def working(store: Path, sources: Path, log: Path, seed: int) -> Iterator[subprocess.Popen[bytes]]:
    """Change a store in a process of its own until the block ends."""
    log.touch()
    line = [sys.executable, "-m", __spec__.name, "--seed", str(seed), "--work", str(store), str(sources), str(log)]
    with subprocess.Popen(line, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def work(folder: Path, sources: Path, log: Path, chance: random.Random) -> None:
    """Change a store until somebody ends it; every switch is announced before and told of after."""
    store = Store(folder)
    with log.open("a", buffering=1, encoding="ascii") as told:
        while True:
            installed = store.install(open_source(chance.choice(sorted(sources.iterdir()))))
            told.write(f"begin {installed.name}\n")
            store.activate(installed.name, test=False)
            told.write(f"done {installed.name}\n")
            store.starting()
            if chance.random() < 0.7:
                store.healthy(installed.name)
            elif (before := next((each for each in store.list() if each.previous), None)) is not None:
                told.write(f"begin {before.name}\n")
                store.rollback()
                told.write(f"done {before.name}\n")
            if chance.random() < 0.5:
                store.gc()


def read(path: Path) -> str:
    """The whole lines of a log."""
    return path.read_text(encoding="ascii").rpartition("\n")[0]


if __name__ == "__main__":
    main()
