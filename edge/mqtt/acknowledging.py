"""Telling the broker which messages are safe with us, in the order in which it sent them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial


@dataclass(eq=False)
class _Unacked:
    """A message that the broker still keeps for us."""

    mid: int
    done: bool = False


class Acknowledgements:
    """The PUBACKs that are due on a link.

    Args:
        send: sends one, by the message's number.
    """

    def __init__(self, send: Callable[[int], object]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._unacked: deque[_Unacked] = deque()  # of the present link; guarded by _lock

    def expect(self, mid: int) -> Callable[[], None]:
        """A message has come; gives what says that it is safe, to be called once, from any thread."""
        unacked = _Unacked(mid)
        with self._lock:
            self._unacked.append(unacked)
        return partial(self._ack, unacked)

    def forget(self) -> None:
        """There is another link, over which the broker sends again what was not acknowledged."""
        with self._lock:
            self._unacked.clear()

    def _ack(self, unacked: _Unacked) -> None:
        """Send the PUBACKs that are due; none for a message of an earlier link: its number may be another's now."""
        with self._lock:
            unacked.done = True
            while self._unacked and self._unacked[0].done:
                self._send(self._unacked.popleft().mid)
