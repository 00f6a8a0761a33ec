"""The arguments of a tool call, for wire formats that carry them as an object."""

from __future__ import annotations

import json
from typing import Any


def arguments_object(text: str) -> dict[str, Any]:
    """A call's arguments, read from their JSON text.

    A model that is not held to a schema may write what is no object, or no JSON where the answer was cut off: that
    becomes the one argument ``arguments``, so that the client sees what it was.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return value if isinstance(value, dict) else {"arguments": value}
