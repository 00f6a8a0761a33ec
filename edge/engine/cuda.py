"""What there is of CUDA, found without CUDA and without onnxruntime: the GPU's architecture, and a library's kernels.

A CUDA library holds machine code for some architectures (``sm_90``), and sometimes an intermediate form (PTX) that the
driver compiles for newer ones. Where neither fits, every kernel launch fails. So both are looked at before anything is
loaded: the GPU through the driver or, on a Jetson, the device tree; the library in its section ``.nv_fatbin`` [1].

[1] https://docs.nvidia.com/cuda/cuda-compiler-driver-nvcc/index.html#gpu-compilation
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final

DEVICE_TREE: Final = Path("/proc/device-tree/compatible")
_TEGRA: Final = {"nvidia,tegra194": 72, "nvidia,tegra234": 87, "nvidia,tegra264": 110}
"""Architectures of Jetsons by their chip: Xavier, Orin, Thor."""
_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*."""
_FATBIN_MAGIC: Final = 0xBA55ED50
_PTX: Final = 1
_DT_NULL, _DT_NEEDED = 0, 1
_MOST_BYTES: Final = 64 << 20
"""Of one table: the names of a library's symbols take some hundred kilobytes."""
_LARGEST: Final = 1 << 40


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU."""

    sm: int
    """Architecture: ten times the compute capability, 87 for 8.7."""
    on_chip: bool
    """Part of a Jetson's chip, for which code of its own has to be compiled."""


@dataclass(frozen=True)
class Library:
    """What matters of a shared library."""

    kernels: frozenset[int]
    """Architectures with machine code."""
    ptx: frozenset[int]
    """Architectures with intermediate code."""
    needed: tuple[str, ...]
    """Names of the libraries that it loads."""

    def runs_on(self, gpu: Gpu) -> bool:
        """Whether it has code for a GPU; nothing found counts as yes, since the library's layout may be another one.

        Machine code runs on later architectures of the same generation, but for Jetsons, where it must be theirs [1].

        [1] https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#binary-compatibility
        """
        if not self.kernels and not self.ptx:
            return True
        if gpu.sm in self.kernels or any(sm <= gpu.sm for sm in self.ptx):
            return True
        return not gpu.on_chip and any(sm // 10 == gpu.sm // 10 and sm <= gpu.sm for sm in self.kernels)


def find_gpu(device_tree: Path = DEVICE_TREE) -> Gpu | None:
    """The first NVIDIA GPU; None where there is none, or no driver for it."""
    on_chip = jetson(device_tree)
    sm = _ask_driver()
    if sm is None:
        return None if on_chip is None else Gpu(on_chip, on_chip=True)
    return Gpu(sm, on_chip=on_chip is not None)


def jetson(device_tree: Path = DEVICE_TREE) -> int | None:
    """The architecture of a Jetson's GPU; None on other machines."""
    try:
        names = device_tree.read_text("utf-8", "replace").split("\0")
    except OSError:
        return None
    return next((_TEGRA[name] for name in names if name in _TEGRA), None)


def read_library(path: Path) -> Library:
    """Look into a 64-bit little-endian ELF file; only headers are read, of a library of some hundred megabytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or it is damaged.
    """
    with path.open("rb") as file:
        try:
            sections = _sections(file)
            code = list(_code(file, *sections[".nv_fatbin"])) if ".nv_fatbin" in sections else []
            needed = tuple(_needed(file, sections))
        except (struct.error, OverflowError) as error:  # it ends too early, or a number leads far beyond
            raise ValueError(f"{path} is damaged: {error}") from None
    machine = frozenset(sm for kind, sm in code if kind != _PTX)
    return Library(machine, frozenset(sm for kind, sm in code if kind == _PTX), needed)


def can_load(name: str) -> bool:
    """Whether a library is on the system, or in one of the packages ``nvidia-*`` where onnxruntime looks too."""
    try:
        ctypes.CDLL(name)
    except OSError:
        spec = importlib.util.find_spec("nvidia")
        folders = list(spec.submodule_search_locations or ()) if spec else []
        return any(next(Path(folder).glob(f"**/lib/{name}"), None) for folder in folders)
    return True


def _ask_driver() -> int | None:
    """The architecture of the driver's first GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        get: Callable[..., int] = driver.cuDeviceGetAttribute
    except (OSError, AttributeError):
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or get(ctypes.byref(major), _ATTRIBUTE_MAJOR, device)
        or get(ctypes.byref(minor), _ATTRIBUTE_MINOR, device)
    )
    return None if failed else 10 * major.value + minor.value


def _sections(file: BufferedReader) -> dict[str, tuple[int, int]]:
    """Offset and size of each section of an ELF file."""
    header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{file.name} is no library of a 64-bit system")
    (table,) = struct.unpack_from("<Q", header, 40)
    size, count, names_index = struct.unpack_from("<HHH", header, 58)
    headers = [struct.unpack("<IIQQQQ", _read(file, table + index * size, 40)) for index in range(count)]
    names = _read(file, *headers[names_index][4:6]) if names_index < count else b""
    return {names[each[0] :].partition(b"\0")[0].decode("ascii", "replace"): (each[4], each[5]) for each in headers}


def _code(file: BufferedReader, start: int, size: int) -> Iterator[tuple[int, int]]:
    """Kind and architecture of each piece of code in a ``.nv_fatbin``: containers, padded to 8 bytes, of pieces."""
    place, end = start, start + size
    while place + 16 <= end:
        magic, _version, header_size, body_size = struct.unpack("<IHHQ", _read(file, place, 16))
        if magic != _FATBIN_MAGIC:
            place += 8
            continue
        place += header_size
        stop = min(place + body_size, end)
        while place < stop:
            kind, _version, piece_header, piece_size, sm = struct.unpack("<HHIQ12xI", _read(file, place, 32))
            yield kind, sm
            place += max(piece_header + piece_size, 1)


def _needed(file: BufferedReader, sections: dict[str, tuple[int, int]]) -> Iterator[str]:
    """The libraries that the dynamic section names."""
    if ".dynamic" not in sections or ".dynstr" not in sections:
        return
    names, table = _read(file, *sections[".dynstr"]), _read(file, *sections[".dynamic"])
    for tag, value in struct.iter_unpack("<QQ", table[: len(table) // 16 * 16]):
        if tag == _DT_NULL:
            return
        if tag == _DT_NEEDED:
            yield names[value:].partition(b"\0")[0].decode("ascii", "replace")


def _read(file: BufferedReader, place: int, size: int) -> bytes:
    """Some bytes; as many as there are at the file's end.

    Raises:
        ValueError: no library is so large.
    """
    if size > _MOST_BYTES or place > _LARGEST:
        raise ValueError(f"{file.name} is damaged: {size} bytes at {place}")
    file.seek(place)
    return file.read(size)
