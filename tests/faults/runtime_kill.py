"""The runtime is killed again and again while a client asks: every request gets one answer, and only one.

    python -m tests.faults.runtime_kill --requests 2000

When all are answered, every request is sent once more: its answer must be the same.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path

from edge.mqtt import EmbeddedBroker
from tests.faults.requester import Requester
from tests.faults.runtime import runtime

PAUSE_S = (0.4, 1.5)
"""How long a process lives after it is ready."""


def main() -> None:
    """Run the campaign and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--timeout-s", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(json.dumps(campaign(options.requests, options.seed, options.timeout_s)))


def campaign(number: int, seed: int, timeout_s: float) -> dict[str, int | float]:
    """Ask ``number`` questions of a runtime that is killed all the time."""
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place, EmbeddedBroker(0) as broker:
        folder = Path(place)
        killer = Killer(broker.address.port, folder, random.Random(seed))
        with Requester(broker.address.port, "victim") as client:
            killer.start()
            unanswered = client.ask_all(number, timeout_s=timeout_s)
            killer.stop()
            with runtime(broker.address.port, "victim", folder / "journal", folder / "log"):
                again = client.ask_all(number, times=2, timeout_s=timeout_s)
        return {
            "seed": seed,
            "requests": number,
            "kills": killer.num_kills,
            "unanswered": len(unanswered),
            "not_replayed": len(again),
            "different_answers": len(client.contradictions()),
            "answered": client.num_answered(),
            "asked_under_a_new_id": client.num_given_up,
            "sent": client.num_sent,
            "seconds": round(time.monotonic() - began, 1),
        }


class Killer:
    """Starts the runtime and kills it, over and over, in a thread."""

    def __init__(self, port: int, folder: Path, chance: random.Random) -> None:
        self.num_kills = 0
        self._port = port
        self._folder = folder
        self._chance = chance
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; nothing runs any more."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            with runtime(self._port, "victim", self._folder / "journal", self._folder / "log"):
                self._stopping.wait(self._chance.uniform(*PAUSE_S))
            self.num_kills += 1


if __name__ == "__main__":
    main()
