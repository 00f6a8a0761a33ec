"""Requests for the model, whichever device answers: the pool of all devices that serve it.

Brokers share a pool's requests among its subscribers in turn and do not ask who is busy. So a device that is full
leaves: it unsubscribes until it has room again. The next request goes to another device, or, where all are full, the
broker tells its sender (MQTT 5) that nobody was there. Requests that were on their way when a device left are refused
with 429 and find another device by their sender's next attempt.

The pool has a connection of its own, whose session ends with the link: what a broker has handed to a device that dies
must not wait for its return. Whoever asked sends the request again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from edge.mqtt.connection import Connection
from edge.mqtt.messages import MAX_PAYLOAD_BYTES
from edge.mqtt.packets import Identity, Incoming
from edge.service import Service
from edge.settings.mqtt import BrokerAddress

log = logging.getLogger(__name__)

FULL_POLL_S: Final = 0.05
"""How often a full device looks whether it has room again."""
RETRY_S: Final = 0.2
"""When to try again after a request reached a device that was just full: another one may have room."""
FREE_POLL_S: Final = 1.0
"""How often a device with room looks whether other work has filled it."""


class Pool:
    """A device's membership.

    Args:
        service: runs the requests, and knows how many there are, however they came.
        address: the broker.
        identity: client id and credentials of the pool's connection.
        topics: the shared subscription, see :func:`edge.mqtt.topics.pool_filter`.
        keepalive_s: as for the device's connection.
        slots: requests, running and waiting, at which the device is full; None = the engine's slots.
        take: gets the requests that there is room for; called on the network thread, must only enqueue.
        refuse: answers those that there is no room for with 429, and the seconds until the next attempt.
    """

    def __init__(
        self,
        service: Service,
        address: BrokerAddress,
        identity: Identity,
        topics: str,
        *,
        keepalive_s: int,
        slots: int | None,
        take: Callable[[Incoming], None],
        refuse: Callable[[Incoming, float], None],
    ) -> None:
        self._service = service
        self._topics = topics
        self._slots = slots or service.stats().slots
        self._take = take
        self._refuse = refuse
        self._connection = Connection(
            address,
            identity,
            keepalive_s=keepalive_s,
            filters=(),
            max_payload=MAX_PAYLOAD_BYTES,
            on_message=self._receive,
            keep_session=False,
        )
        self._lock = threading.Lock()
        self._num_in_transit = 0
        """Requests that were taken and that the service does not know yet."""
        self._member = False
        self._stopping = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def member(self) -> bool:
        """Whether requests arrive."""
        return self._member and self._connection.ready

    def start(self) -> None:
        """Connect in the background, and join whenever there is room."""
        self._adjust()
        self._connection.start()
        self._thread = threading.Thread(target=self._run, name="mqtt-pool", daemon=True)
        self._thread.start()

    def serve(self, topics: str) -> None:
        """Be a member of the pool of another model from now on."""
        with self._lock:
            if topics != self._topics:
                self._topics = topics
                self._connection.listen([topics] if self._member else [])

    def stop(self) -> None:
        """Leave for good."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._connection.stop()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(FREE_POLL_S if self._member else FULL_POLL_S)
            self._wake.clear()
            self._adjust()

    def _receive(self, message: Incoming) -> None:
        with self._lock:
            has_room = self._load() < self._slots
            self._num_in_transit += has_room
        if has_room:
            self._take(replace(message, ack=lambda: self._arrived(message)))
        else:
            self._refuse(message, RETRY_S)
        self._adjust()
        self._wake.set()  # from now on look more often

    def _arrived(self, message: Incoming) -> None:
        """The service, or its requester, knows what becomes of a message."""
        message.ack()
        with self._lock:
            self._num_in_transit -= 1

    def _adjust(self) -> None:
        """Join or leave."""
        with self._lock:
            # Who has left waits for more than one free slot, so that a busy device does not come and go all the time.
            needed = 1 if self._member else max(1, self._slots // 4)
            member = self._slots - self._load() >= needed and self._service.stats().accepting
            if member != self._member:
                self._member = member
                self._connection.listen([self._topics] if member else [])
                log.debug("%s the pool", "joined" if member else "left")

    def _load(self) -> int:
        stats = self._service.stats()
        return stats.num_running + stats.num_waiting + self._num_in_transit
