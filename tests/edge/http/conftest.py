"""Fixtures: real servers on free ports."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from edge.settings.server import ServerSettings
from tests.browser import Browser, chromium
from tests.fakes import FakeEngine
from tests.serving import Served, served

_USUAL = (
    "ERR_CONNECTION_REFUSED",
    "/health - Failed to load resource: the server responded with a status of 503",
    "/v1/bundles - Failed to load resource: the server responded with a status of 404",
)
"""What the browser logs where the page asks for the health of a server that has just ended, or loads another model, and
for the bundles of one that has no store."""


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Start servers: ``serve(engine, max_queue=..., app={...}, max_body_bytes=...)``; all end with the test."""
    with ExitStack() as stack:

        def start(engine: FakeEngine | None = None, *, max_queue: int = 8, app: Any = None, **settings: Any) -> Served:
            chosen = ServerSettings(port=0, **settings)
            server = served(engine or FakeEngine(), max_queue=max_queue, settings=chosen, **(app or {}))
            return stack.enter_context(server)

        yield start


@pytest.fixture(scope="session")
def shared_browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """The browser with a desktop's window; fails the test if the page logged an error."""
    shared_browser.resize(1100, 760)
    shared_browser.console()
    yield shared_browser
    logged = [line for line in shared_browser.console() if not any(usual in line for usual in _USUAL)]
    shared_browser.open("about:blank")
    assert logged == []


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A server with nothing special about it, for tests that leave it as they found it."""
    with served(FakeEngine(), max_queue=8, settings=ServerSettings(port=0)) as running:
        yield running
