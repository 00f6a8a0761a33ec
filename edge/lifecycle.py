"""What a service tells systemd: that it is ready, alive, beginning anew or stopping [1].

The watchdog is fed as long as the engine makes progress, so systemd ends and restarts a process that hangs although it
still answers. Without systemd nothing of this does anything.

[1] https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

log = logging.getLogger(__name__)


class Notifier:
    """Sends states to the socket that systemd names.

    Args:
        env: the environment: ``NOTIFY_SOCKET``, and ``WATCHDOG_USEC`` with ``WATCHDOG_PID`` where there is a watchdog.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._path = env.get("NOTIFY_SOCKET", "")
        self._watchdog_s = _watchdog_s(env) if self._path else None
        self._stopping = threading.Event()
        self._feeder: threading.Thread | None = None

    def ready(self, status: str) -> None:
        """The service answers from now on."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={text}")

    def reloading(self) -> None:
        """The process begins anew, and will be ready again."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=beginning anew")

    def stopping(self) -> None:
        """The service ends."""
        self._send("STOPPING=1\nSTATUS=finishing what runs")

    def watch(self, is_alive: Callable[[], bool]) -> None:
        """Feed the watchdog, if there is one, as long as ``is_alive`` says so; until :meth:`close`."""
        if self._watchdog_s is None:
            return
        self._feeder = threading.Thread(target=self._feed, args=(is_alive, self._watchdog_s / 2), daemon=True)
        self._feeder.name = "watchdog"
        self._feeder.start()

    def close(self) -> None:
        """Feed no more."""
        self._stopping.set()
        if self._feeder is not None:
            self._feeder.join()
            self._feeder = None

    def _feed(self, is_alive: Callable[[], bool], every_s: float) -> None:
        was_alive = True
        while not self._stopping.wait(every_s):
            alive = is_alive()
            if alive:
                self._send("WATCHDOG=1")
            elif was_alive:
                log.critical("the engine makes no progress: the watchdog is not fed any more")
            was_alive = alive

    def _send(self, message: str) -> None:
        if not self._path:
            return
        address = f"\0{self._path[1:]}" if self._path.startswith("@") else self._path
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(message.encode(), socket.MSG_DONTWAIT, address)


def _watchdog_s(env: Mapping[str, str]) -> float | None:
    """Seconds within which the watchdog wants to be fed; None where there is none, or it watches another process."""
    text, pid = env.get("WATCHDOG_USEC", ""), env.get("WATCHDOG_PID", "")
    if not text.isdecimal() or int(text) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1e6
