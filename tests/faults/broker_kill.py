"""The broker is killed again and again under load: no request is lost, and the device is back within seconds.

python -m tests.faults.broker_kill --kills 50
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

from edge.journal import Journal
from edge.mqtt import EmbeddedBroker, MqttBridge
from edge.settings.mqtt import MqttSettings
from tests.fakes import FakeEngine, make_service
from tests.faults.requester import Requester
from tests.faults.runtime import answer
from tests.serving import wait_for

PAUSE_S = (0.5, 2.0)
"""How long the broker lives once the device is back."""


def main() -> None:
    """Run the campaign and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(json.dumps(campaign(options.kills, options.seed)))


def campaign(kills: int, seed: int) -> dict[str, int | float]:
    """Kill the broker ``kills`` times while a client asks."""
    print(f"seed {seed}", flush=True)
    chance = random.Random(seed)
    service = make_service(FakeEngine(answer, slots=4, step_s=0.001), max_queue=64)
    service.start()
    back_s: list[float] = []
    with tempfile.TemporaryDirectory() as place, EmbeddedBroker(0) as broker:
        settings = MqttSettings(device="steady", keepalive_s=5, pool="off")
        bridge = MqttBridge(service, settings, broker.address, Journal(Path(place) / "journal"))
        bridge.start()
        wait_for(lambda: bridge.connected)
        with Requester(broker.address.port, "steady") as client:
            load = Load(client)
            load.start()
            for _ in range(kills):
                time.sleep(chance.uniform(*PAUSE_S))
                back_s.append(kill(broker, bridge))
            number, unanswered = load.stop()
        bridge.stop()
    service.stop()
    return {
        "seed": seed,
        "kills": kills,
        "requests": number,
        "unanswered": unanswered,
        "different_answers": len(client.contradictions()),
        "back_s_max": round(max(back_s), 2),
        "sent": client.num_sent,
    }


def kill(broker: EmbeddedBroker, bridge: MqttBridge) -> float:
    """Kill the broker; returns the seconds until the device is connected to the next one."""
    wait_for(lambda: broker.pid is not None)
    assert broker.pid is not None
    began = time.monotonic()
    os.kill(broker.pid, signal.SIGKILL)
    wait_for(lambda: not bridge.connected, 20)
    wait_for(lambda: bridge.connected, 30)
    return time.monotonic() - began


class Load:
    """Asks in rounds, in a thread, until it is told to stop."""

    def __init__(self, client: Requester) -> None:
        self._client = client
        self._stopping = threading.Event()
        self._rounds = self._unanswered = 0
        self._thread = threading.Thread(target=self._run, name="load")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> tuple[int, int]:
        """Finish the round; returns how many requests were made and how many got no answer."""
        self._stopping.set()
        self._thread.join()
        return self._rounds * ROUND, self._unanswered

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._unanswered += len(self._client.ask_all(ROUND, prefix=f"b{self._rounds}-"))
            self._rounds += 1


ROUND = 20
"""Requests of a round."""


if __name__ == "__main__":
    main()
