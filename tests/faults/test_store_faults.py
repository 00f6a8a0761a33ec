"""The campaigns of bundles and the model store, small. Each prints its seed."""

from __future__ import annotations

import random

import pytest

from tests.faults import power_cut, store_power_cut, tamper


def test_after_a_power_cut_the_old_or_the_new_bundle_is_active() -> None:
    if reason := power_cut.obstacle():
        pytest.skip(reason)
    figures = store_power_cut.campaign(3, random.randrange(1 << 32))
    assert figures["switches"] > 0
    assert (figures["not_active"], figures["damaged"], figures["not_resumed"]) == (0, 0, 0)


def test_every_change_of_a_signed_bundle_is_refused() -> None:
    figures = tamper.campaign(100, random.randrange(1 << 32))
    assert figures["accepted"] == 0
