"""The clients that programs use: :class:`Client` blocks, :class:`AsyncClient` runs on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Final, Self

from edge.client.answer import text_of
from edge.client.driving import Drive
from edge.client.exchange import OnProgress
from edge.client.setup import Target, chat_body, make_question
from edge.errors import QwedgeError

TIMEOUT_S: Final = 300.0
"""How long an answer may take unless the caller says otherwise."""


class Stream:
    """An answer whose text is read as it comes: with ``for``, or with ``async for``.

    Iterating asks the question; leaving the loop before its end cancels it.
    """

    def __init__(self, drive: Drive) -> None:
        self._drive = drive
        self.answer: dict[str, Any] | None = None
        """OpenAI's whole answer, after the end."""

    @property
    def id(self) -> str:
        """The request's id."""
        return self._drive.question.id

    def __iter__(self) -> Generator[str, None, None]:
        yield from self._drive.blocking()
        if rest := self._rest():
            yield rest

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        async with aclosing(self._drive.on_loop()) as pieces:
            async for piece in pieces:
                yield piece
        if rest := self._rest():
            yield rest

    def _rest(self) -> str:
        self.answer = self._drive.exchange.answer()
        return self._drive.exchange.rest()


class _Asker:
    """What both clients have in common."""

    def __init__(self, url: str, *, timeout_s: float | None = TIMEOUT_S, **target: Any) -> None:
        self._transport = Target(url, **target).transport()
        self._timeout_s = timeout_s

    def stream(
        self,
        question: str | Mapping[str, Any],
        *,
        id: str | None = None,  # noqa: A002 - the protocol's word
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Stream:
        """Ask, and get the answer's text as it comes.

        Args:
            question: what the user says, or a request of OpenAI's API.
            id: the request's id; see :meth:`Client.ask`.
            timeout_s: instead of the client's.
            on_progress: gets what is known about the request.

        Raises:
            RequestError: the id is not allowed, or several answers are asked for.
        """
        body = chat_body(question, None, {}) if isinstance(question, str) else question
        return Stream(self._drive(body, id, timeout_s, on_progress, stream=True))

    def _drive(
        self,
        body: Mapping[str, Any],
        request_id: str | None,
        timeout_s: float | None,
        on_progress: OnProgress | None,
        *,
        stream: bool = False,
    ) -> Drive:
        question = make_question(body, request_id, stream=stream)
        return Drive(self._transport, question, timeout_s or self._timeout_s, on_progress)


class Client(_Asker):
    """Asks a device, a pool of devices, or a server; safe to use from several threads.

    ::

        with Client("mqtt://broker:1883", client="press-7", device="edge-1") as client:
            print(client.ask("Name a colour."))

    Args:
        url: ``mqtt://HOST:PORT``, ``mqtts://...``, ``http://HOST:PORT`` or ``https://...``.
        timeout_s: seconds until a request is given up; None = never.
        target: the other fields of :class:`~edge.client.setup.Target`: ``client``, ``device`` or ``pool``, ``root``,
            ``username``, ``password``, ``key``, ``connect_timeout_s``.

    Raises:
        ConfigError: the address is none, or the target does not fit it.
        RequestError: the client's name is not allowed.
    """

    def __enter__(self) -> Self:
        try:
            self._transport.connect()
        except QwedgeError:
            self.close()  # or it would go on trying
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; requests that still run in other threads are cancelled."""
        self._transport.close()

    def check(self) -> None:
        """Look whether somebody could answer now.

        Raises:
            UnavailableError: nobody could, and why.
        """
        self._transport.check()

    def ask(
        self,
        prompt: str,
        *,
        system: str | None = None,
        id: str | None = None,  # noqa: A002 - the protocol's word
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
        **fields: Any,
    ) -> str:
        """Ask a question; returns the text of the answer.

        Args:
            prompt: what the user says.
            system: the system message.
            id: the request's id; None = a new one. One that a program keeps over its own restart brings the same
                answer again, without a second run (MQTT).
            timeout_s: instead of the client's.
            on_progress: gets what is known about the request.
            fields: of OpenAI's request, such as ``temperature`` and ``max_tokens``.

        Raises:
            QwedgeError: there is no answer; the class says why (``edge.errors``).
        """
        body = chat_body(prompt, system, fields)
        return text_of(self.chat(body, id=id, timeout_s=timeout_s, on_progress=on_progress))

    def chat(
        self,
        body: Mapping[str, Any],
        *,
        id: str | None = None,  # noqa: A002 - the protocol's word
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> dict[str, Any]:
        """Send a request of OpenAI's API; returns OpenAI's answer.

        Args:
            body: with ``messages``, or with a ``prompt``: all that HTTP takes.
            id: the request's id; see :meth:`ask`.
            timeout_s: instead of the client's.
            on_progress: gets what is known about the request.

        Raises:
            QwedgeError: there is no answer.
        """
        drive = self._drive(body, id, timeout_s, on_progress)
        for _ in drive.blocking():
            raise AssertionError("only streams have pieces")
        return drive.exchange.answer()


class AsyncClient(_Asker):
    """The same for asyncio: ``async with AsyncClient(...) as client: await client.ask("Name a colour.")``.

    Arguments and errors are those of :class:`Client`.
    """

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self._transport.connect)
        except QwedgeError:
            await self.close()  # or it would go on trying
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See :meth:`Client.close`."""
        await asyncio.to_thread(self._transport.close)

    async def check(self) -> None:
        """See :meth:`Client.check`."""
        await asyncio.to_thread(self._transport.check)

    async def ask(
        self,
        prompt: str,
        *,
        system: str | None = None,
        id: str | None = None,  # noqa: A002 - the protocol's word
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
        **fields: Any,
    ) -> str:
        """See :meth:`Client.ask`."""
        body = chat_body(prompt, system, fields)
        return text_of(await self.chat(body, id=id, timeout_s=timeout_s, on_progress=on_progress))

    async def chat(
        self,
        body: Mapping[str, Any],
        *,
        id: str | None = None,  # noqa: A002 - the protocol's word
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> dict[str, Any]:
        """See :meth:`Client.chat`."""
        drive = self._drive(body, id, timeout_s, on_progress)
        async with aclosing(drive.on_loop()) as pieces:
            async for _ in pieces:
                raise AssertionError("only streams have pieces")
        return drive.exchange.answer()
