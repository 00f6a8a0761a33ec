"""Whom a device trusts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.settings.engine import ModelSettings

if TYPE_CHECKING:
    from edge.signing import Trust


def trust_of(settings: ModelSettings) -> Trust | None:
    """The keys of which one must have signed a bundle; None where signatures are not looked at."""
    if settings.trust is None:
        return None
    from edge.signing import Trust  # noqa: PLC0415 - brings the cryptography, which the others do without

    return Trust(settings.trust.expanduser())
