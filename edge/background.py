"""Work beside the thread that waits for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Do something in a thread of its own.

    The thread does not keep the process alive: Ctrl-C ends both, however long the work still takes. An executor would
    wait for it.

    Args:
        work: its result, or what it raises, is the future's.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it, whatever it is
            future.set_exception(error)

    Thread(target=run, daemon=True, name="background").start()
    return future
