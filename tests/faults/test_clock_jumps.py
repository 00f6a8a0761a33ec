"""The campaign of the wall clock, small. It prints its seed."""

from __future__ import annotations

import random

import pytest

from tests.faults import clock_jumps
from tests.firmware.tools import missing

pytestmark = pytest.mark.broker


def test_no_deadline_depends_on_the_wall_clock() -> None:
    if reason := clock_jumps.obstacle():
        missing(reason)
    figures = clock_jumps.campaign(1, random.randrange(1 << 32))
    assert figures["unmoved"] == 0
    assert {name: figures[name] for name in ("early", "forgotten", "lost_links", "uptime_wrong")} == {
        "early": 0,
        "forgotten": 0,
        "lost_links": 0,
        "uptime_wrong": 0,
    }
    assert figures["before_s"] == 0
    assert figures["late_s"] < clock_jumps.TIMEOUT_S / 2  # of seconds and not of years; a busy machine may take a few
    assert figures["watchdog_gap_s"] < clock_jumps.TIMEOUT_S / 2
