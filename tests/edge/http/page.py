"""What tests of the page have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.browser import ENTER, MISSING, Browser
from tests.serving import Served

MARKS = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
Serve = Callable[..., Served]
PROMPT, ANSWER = "#prompt", ".turn.assistant .markdown"


def open_page(browser: Browser, server: Served, view: str = "chat") -> None:
    """Open a view and wait for the page to be ready; what was there before is gone."""
    browser.open("about:blank")
    browser.open(f"{server.url}/#/{view}")
    browser.wait("document.querySelector('#status')?.dataset.state !== 'connecting'")
    browser.wait(f"!document.querySelector('#{view}-view').hidden")


def ask(browser: Browser, text: str) -> None:
    """Ask and wait for the end of the answer."""
    num_before = count(browser, ".turn.assistant")
    browser.type(PROMPT, text + ENTER)
    browser.wait(f"document.querySelectorAll('.turn.assistant').length > {num_before}")
    finished(browser)


def finished(browser: Browser) -> None:
    """Wait until no answer is being written."""
    browser.wait("document.querySelector('#stop').hidden")


def count(browser: Browser, selector: str) -> int:
    """How many elements match."""
    return int(browser.run("return document.querySelectorAll(arguments[0]).length", selector))


def texts(browser: Browser, selector: str) -> list[str]:
    """Visible texts of all elements that match."""
    found: Any = browser.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", selector)
    return list(found)


def fits(browser: Browser, width: int, view: str) -> bool:
    """Whether nothing is wider than the window."""
    widths = browser.run(
        "return [document.documentElement, document.querySelector(arguments[0])].map((e) => e.scrollWidth)",
        f"#{view}-view",
    )
    return bool(max(widths) <= width)


@contextmanager
def stubbed(browser: Browser, answers: dict[str, Any]) -> Iterator[None]:
    """Answer paths in the page instead of the server: {"METHOD path": JSON, or null for 202 without one}.

    What was sent is in ``window.calls`` and ``window.bodies``; a test changes what is answered in ``window.answers``.
    """
    script = (
        "window.calls = []; window.bodies = []; const real = window.fetch; window.fetch = (path, options = {}) => {"
        "  const call = `${options.method ?? 'GET'} ${path}`;"
        "  if (!(call in window.answers)) return real(path, options);"
        "  window.calls.push(call); if (options.body) window.bodies.push(options.body);"
        "  return Promise.resolve(new Response(JSON.stringify(window.answers[call]))); };"
        "window.answers = "
    ) + json.dumps(answers)
    with browser.before_pages(script):
        yield
