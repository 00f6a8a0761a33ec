"""Work in the background: its result and its errors arrive, and it keeps no process alive."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edge.background import in_background
from edge.errors import BundleError

ENDLESS = """
import time
from edge.background import in_background
in_background(lambda: time.sleep(60))
"""


def test_the_result_arrives() -> None:
    assert in_background(lambda: 6 * 7).result(5) == 42


def test_an_error_reaches_who_waits() -> None:
    def fail() -> None:
        raise BundleError("damaged")

    with pytest.raises(BundleError, match="damaged"):
        in_background(fail).result(5)


def test_unfinished_work_does_not_keep_the_process() -> None:
    assert subprocess.run([sys.executable, "-c", ENDLESS], timeout=60, check=False).returncode == 0
