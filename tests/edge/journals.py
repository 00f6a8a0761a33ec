"""What tests of the journal share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from edge.errors import QwedgeError

TIMEOUT_S = 60.0


def settled(change: Callable[..., None], *arguments: Any) -> QwedgeError | None:
    """Submit a change and wait for the journal's word."""
    told = threading.Event()
    words: list[QwedgeError | None] = []

    def then(error: QwedgeError | None) -> None:
        words.append(error)
        told.set()

    change(*arguments, then)
    assert told.wait(TIMEOUT_S)
    return words[0]
