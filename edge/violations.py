"""What is wrong with a value that came from outside, in the words that all surfaces share."""

from __future__ import annotations

import re
from typing import Final

_SUBJECT: Final = re.compile(r"^(Input|Value|String|List|Tuple|Dictionary) should ")
_DETAIL: Final = re.compile(r", unable .*$| after validation, not \d+$", re.DOTALL)
_WHOLE: Final = {
    "Field required": "is required",
    "Extra inputs are not permitted": "is not known",
    "Input is not a valid path for <class 'pathlib.Path'>": "must be a path",
}


def violation(message: str) -> str:
    """A message of pydantic's as what follows the name of the field: "must be a valid integer"."""
    text = message.removeprefix("Value error, ")
    return _WHOLE.get(text) or _DETAIL.sub("", _SUBJECT.sub("must ", text))
