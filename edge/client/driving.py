"""Drives exchanges: with a thread that may block, or on an event loop."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Generator
from contextlib import suppress

from edge.client.exchange import Exchange, OnProgress
from edge.client.wire import Event, Question, Transport


class Drive:
    """Asks one question, as often as it is iterated over.

    Args:
        transport: carries it.
        question: the request.
        timeout_s: seconds until it is given up; None = never.
        on_progress: gets what is known about it; on the thread, or on the loop, that iterates.
    """

    def __init__(
        self, transport: Transport, question: Question, timeout_s: float | None, on_progress: OnProgress | None
    ) -> None:
        self.question = question
        self._transport = transport
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self.exchange: Exchange
        """The latest one, from the first step on."""

    def blocking(self) -> Generator[str, None, None]:
        """The text as it comes; the calling thread waits for it.

        Raises:
            QwedgeError: as :meth:`~edge.client.exchange.Exchange.steps`, or nobody can be reached at all.
        """
        self._transport.connect()
        # Bounded by the answer: an event is a piece of it, or one movement in the queue.
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        call = self._transport.call(self.question, events.put)
        self.exchange = Exchange(call, self._timeout_s, self._on_progress)
        steps, event = self.exchange.steps(), None
        with suppress(StopIteration):
            try:
                while True:
                    step, event = steps.send(event), None
                    if isinstance(step, str):
                        yield step
                    else:
                        with suppress(queue.Empty):
                            event = events.get(timeout=step)
            finally:
                steps.close()

    async def on_loop(self) -> AsyncGenerator[str, None]:
        """The text as it comes; the event loop goes on meanwhile.

        Raises:
            QwedgeError: as :meth:`~edge.client.exchange.Exchange.steps`, or nobody can be reached at all.
        """
        await asyncio.to_thread(self._transport.connect)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()  # bounded as above

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        call = self._transport.call(self.question, tell)
        self.exchange = Exchange(call, self._timeout_s, self._on_progress)
        steps, event = self.exchange.steps(), None
        with suppress(StopIteration):
            try:
                while True:
                    step, event = steps.send(event), None
                    if isinstance(step, str):
                        yield step
                    else:
                        # Not wait_for(): Python 3.11's forgets a cancellation that comes together with an event.
                        with suppress(TimeoutError):
                            async with asyncio.timeout(step):
                                event = await events.get()
            finally:
                steps.close()
