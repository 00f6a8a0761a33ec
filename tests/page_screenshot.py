"""Takes the page's picture: ``python -m tests.page_screenshot http://127.0.0.1:8080 docs/page.png``."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.browser import ENTER, MISSING, chromium

QUESTION = (
    "Write a Python function that converts a 4-20 mA sensor reading to a percentage, and explain it in two sentences."
)


def main(url: str, target: Path, question: str = QUESTION) -> None:
    """Ask a question on the page and save what is to be seen once it is answered."""
    if MISSING:
        raise SystemExit(MISSING)
    with chromium() as browser:
        browser.resize(1000, 860)
        browser.open(url)
        browser.wait("document.querySelector('#status').dataset.state === 'ok'")
        browser.type("#prompt", question + ENTER)
        browser.wait("document.querySelector('.turn.assistant') !== null")
        browser.wait("document.querySelector('#stop').hidden", seconds=300)
        browser.wait("document.querySelector('#status').dataset.state === 'ok'")
        browser.run("document.querySelector('#scroller').scrollTop = 0")
        browser.screenshot(target)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
