"""A headless Chromium, driven over the W3C WebDriver protocol; all it needs is Debian's chromium-driver.

https://www.w3.org/TR/webdriver2/
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

MISSING = (
    "" if shutil.which("chromium") and shutil.which("chromedriver") else "no chromium: apt install chromium-driver"
)
"""Why there is no browser; empty where there is one."""
ENTER, ESCAPE, TAB, SHIFT, SPACE = "\ue007", "\ue00c", "\ue004", "\ue008", " "
BACKSPACE, CONTROL = "\ue003", "\ue009"
_OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window.

    Args:
        client: speaks to a session of chromedriver.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def open(self, url: str) -> None:
        """Load a page."""
        self._post("url", url=url)

    def resize(self, width: int, height: int, *, dark: bool = False, still: bool = False) -> None:
        """Give the page a size in CSS pixels, smaller than any window may be, and say what the user prefers.

        Args:
            width: of the page.
            height: of the page.
            dark: a dark colour scheme.
            still: as little movement as possible.
        """
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"}
        self._devtools("Emulation.setEmulatedMedia", features=[scheme, motion])

    def grant(self, *permissions: str) -> None:
        """Let pages do what the user would be asked about."""
        self._devtools("Browser.grantPermissions", permissions=list(permissions))

    @contextmanager
    def before_pages(self, script: str) -> Iterator[None]:
        """Run a script before those of every page that is opened in the block."""
        added = self._devtools("Page.addScriptToEvaluateOnNewDocument", source=script)
        try:
            yield
        finally:
            self._devtools("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self._post("execute/sync", script=script, args=list(arguments))

    def wait(self, script: str, *arguments: Any, seconds: float = 60) -> Any:
        """Until an expression is true; its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return {script}", *arguments)):
            assert time.monotonic() < deadline, f"waited in vain for {script}"
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        """Click an element as a user does: it must be visible and not covered."""
        self._post(f"element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Type into an element; for a file input, the path of the file."""
        self._post(f"element/{self._find(selector)}/value", text=text)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select, as a user does."""
        self.run(
            "const node = document.querySelector(arguments[0]); node.value = arguments[1];"
            "node.dispatchEvent(new Event('change', {bubbles: true}))",
            selector,
            value,
        )

    def download_to(self, folder: Path) -> None:
        """Save downloads there, without a question."""
        self._devtools("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def press(self, *keys: str) -> None:
        """Press and release keys, whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def text(self, selector: str) -> str:
        """The visible text of the first element that matches."""
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def console(self) -> list[str]:
        """Errors and warnings that the page or the browser logged since the last call."""
        return [entry["message"] for entry in self._post("se/log", type="browser")]

    def screenshot(self, path: Path) -> None:
        """Save what is to be seen, as PNG."""
        response = self._client.get("screenshot")
        path.write_bytes(base64.b64decode(response.json()["value"]))

    def _find(self, selector: str) -> str:
        return str(self._post("element", using="css selector", value=selector)[_ELEMENT])

    def _devtools(self, command: str, **parameters: Any) -> Any:
        return self._post("goog/cdp/execute", cmd=command, params=parameters)

    def _post(self, command: str, **body: Any) -> Any:
        value = self._client.post(command, json=body).json()["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser until the block ends."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile, _driver() as base:
        options = {"args": [*_OPTIONS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = httpx.post(f"{base}/session", json={"capabilities": {"alwaysMatch": wanted}}, timeout=60)
        session = answer.json()["value"]["sessionId"]
        with httpx.Client(base_url=f"{base}/session/{session}/", timeout=60) as client:
            try:
                yield Browser(client)
            finally:
                client.delete(f"{base}/session/{session}")


@contextmanager
def _driver() -> Iterator[str]:
    """chromedriver on a port of its own choice; its address."""
    process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        started = next(line for line in process.stdout if "started successfully on port" in line)
        yield f"http://127.0.0.1:{int(started.split()[-1].rstrip('.'))}"
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
