"""How well a pool of unequal devices shares a load: ``python -m tests.bench.pool``.

Three processes with the fake engine, whose tokens take 10, 20 and 40 ms, form a pool at a mosquitto of their own. All
jobs are asked for at once. Prints JSON: the time until the last answer against that of the best split, for each run,
and the time where the fastest device is killed (SIGKILL) in the middle; every answer is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time

from edge.client import Client
from edge.mqtt import EmbeddedBroker
from tests.edge.mqtt.fleet import Speed, ask_at_once, fleet, ideal_makespan_s
from tests.fakes import MODEL_NAME

SPEEDS = (Speed(0.01), Speed(0.02), Speed(0.04))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    ideal_s = ideal_makespan_s(SPEEDS, args.jobs, args.tokens)
    with (
        EmbeddedBroker(0) as broker,
        fleet(broker.address, SPEEDS) as workers,
        Client(f"mqtt://{broker.address.host}:{broker.address.port}", pool=MODEL_NAME) as client,
    ):

        def kill_the_fastest() -> None:
            time.sleep(ideal_s / 4)
            os.kill(workers[0].pid, signal.SIGKILL)

        times_s = [ask_at_once(client, args.jobs, args.tokens, lambda: None) for _ in range(args.runs)]
        with_kill_s = ask_at_once(client, args.jobs, args.tokens, kill_the_fastest)
    figures = {
        "jobs": args.jobs,
        "ideal_s": round(ideal_s, 2),
        "makespan_s": [round(t, 2) for t in times_s],
        "ratio": round(statistics.median(times_s) / ideal_s, 3),
        "one_killed_s": round(with_kill_s, 2),
        "lost": 0,  # ask_at_once raises otherwise
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
