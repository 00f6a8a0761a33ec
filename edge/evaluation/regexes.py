"""Regular expressions that cannot hang: those of suites come from anybody, and answers from a model.

Python's own matcher takes exponential time for ``(a+)+$``. Rust's [1], which pydantic brings, takes time in proportion
to the text for every expression, and refuses what it could not do so: look-around and back-references.

[1] https://docs.rs/regex
"""

from __future__ import annotations

from functools import lru_cache

from pydantic_core import SchemaError, SchemaValidator, core_schema

MAX_CHARS = 2000


def is_match(pattern: str, text: str) -> bool:
    """Whether a pattern matches anywhere in a text.

    Raises:
        ValueError: it is no pattern.
    """
    return _compile(pattern).isinstance_python(text)


def check(pattern: str) -> None:
    """Make sure that a pattern can be used.

    Raises:
        ValueError: it cannot, and why.
    """
    _compile(pattern)


@lru_cache(maxsize=256)
def _compile(pattern: str) -> SchemaValidator:
    if len(pattern) > MAX_CHARS:
        raise ValueError(f"the pattern has more than {MAX_CHARS} characters")
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except SchemaError as error:
        lines = str(error).splitlines()
        reason = next((line for line in reversed(lines) if line.strip()), "it does not compile").strip()
        raise ValueError(f"the pattern cannot be used: {reason.removeprefix('error: ')}") from None
