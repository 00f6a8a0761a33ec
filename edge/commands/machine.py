"""What this machine is, from /proc."""

from __future__ import annotations

import platform
import re
from pathlib import Path

ISA_FEATURES = {
    "x86_64": ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"),
    "aarch64": ("asimd", "asimddp", "i8mm", "bf16", "sve"),
}
"""Features of /proc/cpuinfo that the kernels of quantized models use, by machine."""


def cpu_model() -> str:
    """The board's name where the kernel knows it (ARM), else the processor's."""
    board = _read("/proc/device-tree/model").rstrip("\0")
    match = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return board or (match.group(1).strip() if match else platform.machine())


def isa_features(cpuinfo: str | None = None, machine: str | None = None) -> tuple[str, ...]:
    """The features of :data:`ISA_FEATURES` that a /proc/cpuinfo text lists; this machine's by default."""
    text = _read("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    present = set(match.group(1).split()) if match else set()
    return tuple(name for name in ISA_FEATURES.get(machine or platform.machine(), ()) if name in present)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
