"""The campaign against the pool in a small version."""

from __future__ import annotations

import random

import pytest

from tests.faults.pool import campaign

pytestmark = pytest.mark.broker


def test_devices_that_are_killed_lose_no_request() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    figures = campaign(2.0, seed)
    assert figures["kills"] >= 1
    assert figures["answered"] >= 6
