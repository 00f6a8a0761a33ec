"""Malformed requests to every route, a small campaign; ``python -m tests.faults.malformed_http`` runs the large one."""

import random

import httpx

from tests.faults.malformed_http import SOUND, campaign, posted_fields
from tests.serving import Served


def test_malformed_requests_are_refused_and_nothing_breaks() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    figures = campaign(900, seed)
    assert figures["failures"] == []
    assert figures["shapeless"] == []
    # Some mutations are still requests: the rest must have been refused.
    assert figures["statuses"][400] > 500


def test_what_the_campaign_takes_for_sound_is(server: Served) -> None:
    paths = posted_fields(server.client).keys()
    assert paths >= SOUND.keys()
    for path, bodies in SOUND.items():
        for body in bodies:
            response: httpx.Response = server.client.post(path, json=body)
            assert (response.status_code, path) == (200, path), response.text
