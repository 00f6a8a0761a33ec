"""Values from outside are refused in the same words everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.violations import violation


class Fields(BaseModel):
    """One field for each kind of violation."""

    model_config = ConfigDict(extra="forbid")

    number: int = 0
    items: Annotated[list[int], Field(min_length=1)] = [0]
    text: Annotated[str, Field(min_length=1)] = "a"
    path: Path = Path()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"number": "x"}, "must be a valid integer"),
        ({"items": []}, "must have at least 1 item"),
        ({"text": ""}, "must have at least 1 character"),
        ({"path": 7}, "must be a path"),
        ({"numbr": 1}, "is not known"),
    ],
)
def test_a_violation_follows_the_name_of_its_field(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Fields.model_validate(fields)
    assert violation(raised.value.errors()[0]["msg"]) == words
