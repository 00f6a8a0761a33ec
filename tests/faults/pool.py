"""Devices of a pool that are killed all the time: ``python -m tests.faults.pool --seconds 60``.

Three processes with the fake engine form a pool at a mosquitto of their own. One after the other, at random, is ended
with SIGKILL and started again, while threads ask without a pause. Every answer is checked; one that is missing or wrong
ends the campaign with an error. Prints its seed and, in the end, JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from edge.client import Client
from edge.mqtt import EmbeddedBroker
from tests.edge.mqtt.fleet import Speed, fleet, kill_worker, start_worker
from tests.fakes import MODEL_NAME

SPEEDS = (Speed(0.005), Speed(0.01), Speed(0.02))
NUM_ASKERS = 6


def campaign(seconds: float, seed: int) -> dict[str, float]:
    """Run it; returns how much was asked and killed.

    Raises:
        AssertionError, QwedgeError: an answer is wrong, or missing.
    """
    source, ended = random.Random(seed), threading.Event()
    with (
        EmbeddedBroker(0) as broker,
        fleet(broker.address, SPEEDS) as workers,
        Client(f"mqtt://127.0.0.1:{broker.address.port}", pool=MODEL_NAME, timeout_s=120) as client,
        ThreadPoolExecutor(NUM_ASKERS) as threads,
    ):

        def ask(asker: int) -> list[float]:
            times_s, choose = [], random.Random(seed + asker)
            while not ended.is_set():
                began, num_tokens = time.monotonic(), choose.randint(1, 60)
                assert client.ask(f"{asker}: {num_tokens}") == "x" * num_tokens
                times_s.append(time.monotonic() - began)
            return times_s

        asking = [threads.submit(ask, asker) for asker in range(NUM_ASKERS)]
        num_kills, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(source.uniform(0.4, 1.5))
            victim = source.randrange(len(workers))
            kill_worker(workers[victim])
            num_kills += 1
            workers[victim] = start_worker(broker.address, victim, SPEEDS[victim])
        ended.set()
        times_s = [time_s for each in asking for time_s in each.result()]
    return {"answered": len(times_s), "lost": 0, "kills": num_kills, "longest_s": round(max(times_s), 2)}


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    print(json.dumps(campaign(args.seconds, args.seed)))


if __name__ == "__main__":
    main()
