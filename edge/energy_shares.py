"""What each sequence has cost in energy, as far as the machine can tell."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

from edge.sequence import Sequence


class EnergyShares:
    """Charges what the machine uses to the sequences that it works for, in equal shares. The engine's thread only.

    The whole machine is measured, other programs included; what it uses while nobody asks is charged to nobody.

    Args:
        energy_j: joules since some beginning, as :meth:`edge.power.EnergyMeter.energy_j`; None where nothing measures
            them.
    """

    def __init__(self, energy_j: Callable[[], float | None]) -> None:
        self._energy_j = energy_j
        self._charged_j = energy_j()

    def begin(self) -> None:
        """Charge nobody with what was used up to now."""
        if self._charged_j is not None:
            self._charged_j = self._energy_j()

    def charge(self, sequences: List[Sequence]) -> None:
        """Charge ``sequences`` with what was used since the last call."""
        if self._charged_j is None:
            return
        now = self._energy_j()
        if now is not None:
            share = (now - self._charged_j) / max(1, len(sequences))
            for sequence in sequences:
                sequence.energy_j = (sequence.energy_j or 0.0) + share
            self._charged_j = now
