"""When `qwedge serve` ends, and whether it begins anew then."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from typing import Final

EXIT_FORCED: Final = 130


class Leaving:
    """When the server leaves, and whether it begins anew then.

    The first SIGINT or SIGTERM asks to leave; the second leaves, and the kernel ends the broker with us. SIGHUP asks to
    begin anew with the settings read anew.
    """

    def __init__(self) -> None:
        self.begins_anew = False
        """Whether to start again after the end."""
        self.on_hangup: Callable[[], None] = lambda: None
        """What SIGHUP does, on a thread of its own."""
        self._asked = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def listen(self) -> asyncio.Event:
        """Take signals from now on; returns what is set when it is time to leave. On the event loop's thread."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._take)
        self._loop.add_signal_handler(signal.SIGHUP, lambda: threading.Thread(target=self.on_hangup).start())
        if self.begins_anew:  # it was asked for before
            self._asked.set()
        return self._asked

    def begin_anew(self) -> None:
        """Leave in good order, and start the same command again; on any thread."""
        self.begins_anew = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._asked.set)

    def _take(self) -> None:
        if self._asked.is_set() and not self.begins_anew:
            os._exit(EXIT_FORCED)
        self.begins_anew = False
        self._asked.set()
