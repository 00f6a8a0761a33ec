"""``Idempotency-Key``: a request that is sent again gets the answer of the first one, after a restart too.

What the header means: draft-ietf-httpapi-idempotency-key-header-07 [1]. The request is in the journal before it runs,
and its answer before it is complete at the client. A copy that comes meanwhile shares the running one, streams too: it
gets everything from the beginning. Because a copy may come, the client's going away does not end the request. Only
complete answers are kept: what was refused or failed may be tried again under its key.

[1] https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-idempotency-key-header-07
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.errors import (
    CancelledError,
    ConfigError,
    CrashedError,
    QwedgeError,
    RequestError,
    ReusedKeyError,
    UnavailableError,
)
from edge.http.access import is_queued
from edge.http.body import again, read_body
from edge.http.caller import Exchange
from edge.http.disconnect import unless_disconnected
from edge.http.rights import OWNER
from edge.http.shared_answer import SharedAnswer
from edge.journal import Entry, Journal, Key, Then

log = logging.getLogger(__name__)

HEADER: Final = "idempotency-key"
MAX_STARTS: Final = 2
"""How often a request may be at work when the process ends; after that it is not run again."""
FORGET_S: Final = 24 * 3600.0
"""After so long nobody sends a request again whose answer a crash has prevented."""
SETTLE_S: Final = 10.0
"""Seconds that an answer waits for a disk that does not take it."""
_KEY: Final = re.compile(r'(?P<quote>"?)(?P<key>[\x21\x23-\x5b\x5d-\x7e]{1,255})(?P=quote)')
"""A string of structured fields (RFC 8941), or, as most clients send it, bare."""


class Idempotency:
    """ASGI middleware between the guard and the application.

    Args:
        app: the application.
        journal: keeps requests and answers; opened with the first key, closed by others.
        check_room: raises the refusal while the queue is full.
    """

    def __init__(self, app: ASGIApp, journal: Journal, check_room: Callable[[], None]) -> None:
        self._app = app
        self._journal = journal
        self._check_room = check_room
        self._opening = asyncio.Lock()
        self._starts: dict[Key, int] | None = None  # of requests that a crash has interrupted; None until it is open
        self._runs: dict[Key, SharedAnswer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what has no key, and answer what has one."""
        given = Headers(scope=scope).get(HEADER) if scope["type"] == "http" else None
        if given is None or not is_queued(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        exchange: Exchange = scope["state"]["exchange"]
        key = Key(exchange.caller.identity or OWNER, _checked(given))
        body = await read_body(receive)
        fingerprint = hashlib.sha256(scope["path"].encode() + b"\0" + body).digest()
        run = self._runs.get(key)
        replayed = run is not None
        if run is None:
            run = self._runs[key] = SharedAnswer(fingerprint, exchange)
            task = asyncio.create_task(self._answer(key, run, scope, body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        _check_same(run.fingerprint, fingerprint)
        with suppress(CancelledError):
            await unless_disconnected(receive, run.follow(send, replayed=replayed))
        exchange.model = run.exchange.model

    async def _answer(self, key: Key, run: SharedAnswer, scope: Scope, body: bytes) -> None:
        """Fill a run: from the journal, or by the application."""
        stays = False
        try:
            await self._open()
            if (stored := await self._find(key, run.fingerprint)) is not None:
                run.replay(stored)
                return
            await self._enter(key, run.fingerprint)
            await self._work(run, scope, body)
            stays = await self._settle(key, run)
        except QwedgeError as error:
            run.fail(error)
        except Exception:
            log.exception("%s failed", run.exchange.id)
            run.fail(_fault())
        finally:
            if not stays:
                del self._runs[key]

    async def _work(self, run: SharedAnswer, scope: Scope, body: bytes) -> None:
        try:
            await self._app(scope, again(body, _stays), run.take)
        except Exception:  # our own fault, whatever it is: the journal must hear of the end all the same
            log.exception("%s failed", run.exchange.id)
            run.fail(_fault())

    async def _open(self) -> None:
        """Open the journal, unless that has been done, and see what a crash has left."""
        async with self._opening:
            if self._starts is not None:
                return
            try:
                await asyncio.to_thread(self._journal.open)
            except ConfigError as error:
                raise UnavailableError(error.message, hint=error.hint) from None
            entries = await asyncio.to_thread(self._journal.entries)
            left = [entry for entry in entries or [] if entry.key.owner.startswith(OWNER) and entry.outcome is None]
            for entry in left:
                if entry.age_s > FORGET_S:
                    self._journal.settle(entry.key, b"", None, lambda _: None)
            self._starts = {entry.key: entry.starts for entry in left if entry.age_s <= FORGET_S}

    async def _find(self, key: Key, fingerprint: bytes) -> bytes | None:
        """The stored answer."""
        known = await asyncio.to_thread(self._journal.find, key)
        if known is None:
            return None
        _check_same(known.fingerprint, fingerprint)
        return known.outcome

    async def _enter(self, key: Key, fingerprint: bytes) -> None:
        """Have a request in the journal before it runs."""
        assert self._starts is not None
        self._check_room()
        if (starts := self._starts.pop(key, None)) is None:
            self._journal.check()
            entry = Entry(key, fingerprint, reply=b"", request=b"")
            await _durable(lambda then: self._journal.accept(entry, then))
            return
        if starts >= MAX_STARTS:
            self._starts[key] = starts
            hint = "send it under another key if it is not at fault"
            raise CrashedError("the server has ended twice while it worked on this request", hint=hint)
        await _durable(lambda then: self._journal.start(key, starts + 1, then))

    async def _settle(self, key: Key, run: SharedAnswer) -> bool:
        """Enter the answer, or forget the request where there is none that could be kept.

        Returns:
            Whether the run stays for copies to follow, until the disk has the answer.
        """
        outcome = run.outcome()
        committed = asyncio.ensure_future(_durable(lambda then: self._journal.settle(key, b"", outcome, then)))
        await asyncio.wait({committed}, timeout=SETTLE_S)
        if outcome is not None:
            self._journal.delivered(key)  # nothing has to be sent after a restart: the client asks
        run.end()
        if committed.done():
            committed.result()
            return False
        committed.add_done_callback(lambda _: self._runs.pop(key, None))
        return True


async def _stays() -> Message:
    """What comes after the body from a client that does not go away: nothing, ever."""
    nothing: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    return await nothing


def _checked(given: str) -> str:
    match = _KEY.fullmatch(given.strip())
    if match is None:
        hint = "send 1 to 255 visible ASCII characters, such as a UUID"
        raise RequestError("the Idempotency-Key is not acceptable", hint=hint)
    return match["key"]


def _check_same(known: bytes, fingerprint: bytes) -> None:
    if known != fingerprint:
        hint = "a new request needs a new key"
        raise ReusedKeyError("this Idempotency-Key was used for another request", hint=hint)


async def _durable(change: Callable[[Then], None]) -> None:
    """Make a change of the journal and wait until it is durable.

    Raises:
        QwedgeError: it is refused.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def resolve(error: QwedgeError | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def then(error: QwedgeError | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(resolve, error)

    change(then)
    await done


def _fault() -> QwedgeError:
    return QwedgeError("internal error", hint="see the server's log for this request id")
