"""Takes the page's pictures of a running server: ``python -m tests.page_screenshot http://127.0.0.1:8080 docs/images``.

The pictures in the README are of ``qwedge serve --broker embedded`` with the model of ``make model``: the chat with an
answer, the same on a phone in the dark, and the device's view while it answers.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import httpx

from tests.browser import ENTER, ESCAPE, MISSING, Browser, chromium

QUESTIONS = (
    "Motor M3 draws 8.1 A instead of 7.5 A. What should I check first?",
    "Write a Python function that counts the lines of a log file with the word ERROR. Explain it in two sentences.",
)
TRY = "Name one cause of a noisy bearing."
ANSWER_S = 300
SETTLE_S = 0.5
"""How long a picture may take to be drawn."""
LOAD_S = 24
"""How long the device is kept busy before its picture is taken."""


def main(url: str, folder: Path) -> None:
    """Use the page as a technician does, and save what is to be seen."""
    if MISSING:
        raise SystemExit(MISSING)
    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        browser.resize(1200, 860)
        browser.open(url)
        browser.wait("document.querySelector('#status').dataset.state === 'ok'")
        browser.click("#open-settings")
        browser.type("#temperature", "0" + ENTER)  # the same pictures every time
        _chat(browser, folder)
        _device(browser, url, folder)


def _chat(browser: Browser, folder: Path) -> None:
    for question in QUESTIONS:
        browser.click("#new-chat")
        browser.type("#prompt", question + ENTER)
        browser.wait("document.querySelector('.turn.assistant') !== null")
        browser.wait("document.querySelector('#stop').hidden", seconds=ANSWER_S)
    browser.wait("document.querySelector('#status').dataset.state === 'ok'")
    browser.run("document.querySelector('#scroller').scrollTop = 0")
    time.sleep(SETTLE_S)
    browser.screenshot(folder / "chat.png")
    browser.resize(390, 800, dark=True)
    browser.run("document.querySelector('#scroller').scrollTop = 0")
    browser.screenshot(folder / "phone.png")


def _device(browser: Browser, url: str, folder: Path) -> None:
    browser.resize(1200, 1320)
    browser.click("header nav a[href='#/device']")
    load = threading.Thread(target=_load, args=(url,))
    load.start()
    browser.wait("document.querySelector('#device-name').innerText !== ''")
    if not browser.run("return document.querySelector('#mqtt-on').hidden"):
        browser.type("#mqtt-text", TRY + ENTER)
    time.sleep(LOAD_S)
    browser.press(ESCAPE)
    browser.run("document.querySelector('#device-view').scrollTop = 0")
    browser.screenshot(folder / "device.png")
    load.join()


def _load(url: str) -> None:
    """Two clients at once, for as long as the picture needs."""
    until = time.monotonic() + LOAD_S + 3

    def ask(number: int) -> None:
        body = {"messages": [{"role": "user", "content": f"{QUESTIONS[0]} Answer number {number}."}], "max_tokens": 60}
        while time.monotonic() < until:
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=ANSWER_S)
            time.sleep(0.5)

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
