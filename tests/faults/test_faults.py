"""The campaigns of this folder, small. Each prints its seed."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.faults import broker_kill, power_cut, runtime_kill

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(
        shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None, reason="no mosquitto"
    ),
]


@pytest.fixture
def seed() -> int:
    return random.randrange(1 << 32)


def test_killing_the_runtime_loses_no_request_and_no_answer(seed: int) -> None:
    figures = runtime_kill.campaign(40, seed, timeout_s=60)
    assert figures["kills"] > 0
    assert (figures["unanswered"], figures["not_replayed"], figures["different_answers"]) == (0, 0, 0)
    assert figures["answered"] == 40


def test_killing_the_broker_loses_no_request(seed: int) -> None:
    figures = broker_kill.campaign(3, seed)
    assert (figures["unanswered"], figures["different_answers"]) == (0, 0)
    assert figures["back_s_max"] <= 5


def test_a_power_cut_loses_no_acknowledged_request(seed: int) -> None:
    if reason := power_cut.obstacle():
        pytest.skip(reason)
    figures = power_cut.campaign(3, seed)
    assert figures["acknowledged"] > 0
    assert (figures["lost"], figures["different_answers"]) == (0, 0)
