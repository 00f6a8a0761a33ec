"""Power cuts while requests are accepted: no request that was acknowledged is unknown afterwards, nor any answer told.

    python -m tests.faults.power_cut --cuts 100

The journal lies on an ext4 in a file. At a random moment the raw file is copied, as a disk keeps what has been written
and synced when the power fails; the copy is mounted, which replays ext4's own journal, and the requests in it are
compared with those whose acceptance the client had heard of before. Needs root and loop devices.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.journal import Journal, Key
from edge.mqtt import EmbeddedBroker
from tests.faults.requester import Requester
from tests.faults.runtime import runtime

IMAGE_BYTES = 48 << 20
PAUSE_S = (0.05, 0.6)
NAME = "asker"


def main() -> None:
    """Run the campaign and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    reason = obstacle()
    print(reason if reason is not None else json.dumps(campaign(options.cuts, options.seed)))


def obstacle() -> str | None:
    """Why power cuts cannot be emulated here; None where they can."""
    if os.geteuid() != 0:
        return "needs root, to mount"
    if shutil.which("mkfs.ext4") is None:
        return "needs mkfs.ext4"
    with tempfile.TemporaryDirectory() as place:
        image = make_image(Path(place) / "probe", 8 << 20)
        try:
            with mounted(image, Path(place) / "disk"):
                return None
        except subprocess.CalledProcessError:
            return "loop devices cannot be mounted here"


def campaign(cuts: int, seed: int) -> dict[str, int]:
    """Cut the power ``cuts`` times."""
    print(f"seed {seed}", flush=True)
    chance = random.Random(seed)
    lost = changed = 0
    with tempfile.TemporaryDirectory() as place, EmbeddedBroker(0) as broker:
        folder = Path(place)
        with (
            mounted(make_image(folder / "image", IMAGE_BYTES), folder / "disk") as disk,
            runtime(broker.address.port, "cut", disk / "journal", folder / "log") as process,
            Requester(broker.address.port, "cut", NAME) as client,
        ):
            load = Load(client)
            load.start()
            for _ in range(cuts):
                time.sleep(chance.uniform(*PAUSE_S))
                accepted, outcomes = client.heard()
                cut_power(process.pid, folder / "image", folder / "copy")
                missing, others = compare(folder / "copy", folder / "cut", accepted, outcomes)
                lost += missing
                changed += others
            load.stop()
            accepted, outcomes = client.heard()
    return {
        "seed": seed,
        "cuts": cuts,
        "acknowledged": len(accepted),
        "answered": len(outcomes),
        "lost": lost,
        "different_answers": changed + len(client.contradictions()),
    }


class Load:
    """Sends one request after another, in a thread."""

    def __init__(self, client: Requester) -> None:
        self._client = client
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stopping.wait(0.05):
            for _ in range(4):
                self._client.send(f"p{number}", f"question p{number}")
                number += 1


def cut_power(pid: int, image: Path, copy: Path) -> None:
    """Copy the disk as it is now, while its user stands still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        shutil.copyfile(image, copy)
    finally:
        os.kill(pid, signal.SIGCONT)


def compare(copy: Path, place: Path, accepted: set[str], outcomes: dict[str, tuple[int, str]]) -> tuple[int, int]:
    """Look into the disk that lost its power; returns how many requests are lost, and how many answers are others."""
    with mounted(copy, place) as disk:
        journal = Journal(disk / "journal")
        journal.open()
        assert journal.problem is None
        known = {each: journal.find(Key(f"mqtt:{NAME}", each)) for each in accepted | outcomes.keys()}
        journal.close()
    lost = [each for each, found in known.items() if found is None]
    told = {each: found.outcome for each, found in known.items() if found is not None and each in outcomes}
    others = [each for each, outcome in told.items() if outcome is None or text_of(outcome) != outcomes[each][1]]
    return len(lost), len(others)


def text_of(outcome: bytes) -> str:
    """The answer in a stored outcome."""
    return str(json.loads(outcome)["body"]["choices"][0]["message"]["content"])


def make_image(path: Path, size: int) -> Path:
    """A file with an empty ext4 in it."""
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)
    return path


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """Mount an image until the block ends."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


if __name__ == "__main__":
    main()
