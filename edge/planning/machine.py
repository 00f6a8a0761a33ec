"""A machine, as far as speed depends on it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

INT8_FEATURES: Final = frozenset({"asimddp", "avx2"})
"""One of these is what onnxruntime's kernels for int8 activations need."""


def has_int8_kernels(features: Collection[str]) -> bool:
    """Whether a processor with these features can multiply by int8 activations; taken for granted where none is known.

    Args:
        features: as :func:`edge.machine.isa_features` gives them.
    """
    return not features or not INT8_FEATURES.isdisjoint(features)


@dataclass(frozen=True)
class Machine:
    """What the formulas of :mod:`edge.planning.speed` need to know; all rates are those of all its cores together."""

    title: str
    cores: int
    features: tuple[str, ...]
    read_gbs: float
    """10^9 bytes of weights that a decode step reads a second."""
    read_source: str
    """Where that comes from."""
    gops: float
    """10^9 operations a second of products of many rows, 4 bits in blocks of 128 (floats without int8 kernels)."""
    attention_gflops: float
    """10^9 floating-point operations a second of attention over one token."""
    dequantize_ns: float
    """For each 8-bit weight at each use; counts without int8 kernels only."""
    speed: float
    """Of one core at what is no kernel, relative to the machine that docs/planning.md was measured on."""
    storage_mbs: float
    """10^6 bytes a second that its disk reads."""
    memory_bytes: int
    """What the service may take."""
    power_w: float | None
    """While it computes; None where it is not known."""
    power_source: str = ""

    @property
    def int8(self) -> bool:
        """Whether quantized weights are multiplied by int8 activations; if not, they are made floats."""
        return has_int8_kernels(self.features)
