"""The disk: room, kind, and how fast it gives us a bundle."""

from __future__ import annotations

import mmap
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from edge.doctor.check import GIB, MIB, Check, gib
from edge.machine import Host

MIN_FREE: Final = 2 * GIB
"""Bytes; a new bundle of the 0.5B model is copied beside the present one."""
_CHUNK: Final = 4 * MIB
_SAMPLE: Final = 64 * MIB
_SAMPLE_S: Final = 1.0
SLOW: Final = 30e6
"""Bytes a second; below, a bundle takes longer to read than all that follows."""


def examine_disk(host: Host, folder: Path, weights: Path | None) -> list[Check]:
    """What there is to say about the disk.

    Args:
        host: the machine.
        folder: where bundles lie, or will.
        weights: the largest file of the bundle that would be served; None where there is none.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return [_room(host, folder), *([] if weights is None else [_reading(weights)])]


def _room(host: Host, folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    detail = f"{gib(free)} free in {folder} ({disk_kind(host, folder)})"
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        hint = "it serves what is there; for updates and durable requests give it a writable StateDirectory="
        return Check("disk", "warn", f"{detail}, read-only", hint)
    if free < MIN_FREE:
        return Check("disk", "warn", detail, "free some space before installing a model: qwedge gc")
    return Check("disk", "ok", detail)


def disk_kind(host: Host, path: Path) -> str:
    """What a path lies on: ``SD card``, ``eMMC``, ``NVMe``, ``SSD``; where that is not told, the file system's type."""
    device = path.stat().st_dev
    link = host.root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if not link.exists():
        return file_system(host, path)
    block = link.resolve()
    if (block / "partition").exists():
        block = block.parent
    return _kind_of_block(block)


def _kind_of_block(block: Path) -> str:
    host = Host(block)
    if block.name.startswith("mmcblk"):
        return "SD card" if host.text("device/type") == "SD" else "eMMC"
    if block.name.startswith("nvme"):
        return "NVMe"
    if block.name.startswith(("vd", "xvd")):
        return "virtual disk"
    kind = "hard disk" if host.text("queue/rotational") == "1" else "SSD"
    return f"USB, {kind}" if "/usb" in block.as_posix() else kind


def file_system(host: Host, path: Path) -> str:
    """The type of the file system that a path lies on: ``overlay``, ``tmpfs``; ``unknown`` where it is not told."""
    best, found = -1, "unknown"
    for line in host.text("proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split(" ")[4]
        if path.is_relative_to(point) and len(point) >= best:
            best, found = len(point), rest.split(" ")[0]
    return found


def _reading(weights: Path) -> Check:
    speed, size = direct_read_speed(weights), weights.stat().st_size
    if speed is None:
        return Check("disk speed", "ok", "cannot be measured on this file system")
    detail = f"{speed / 1e6:.0f} MB/s, {size / speed:.1f} s for the bundle's weights"
    if speed < SLOW:
        return Check("disk speed", "warn", detail, "move the models to an SSD, eMMC or a faster card (A2, U3)")
    return Check("disk speed", "ok", detail)


def direct_read_speed(path: Path) -> float | None:
    """Bytes that the disk gives in a second, past the page cache, which stays as it is; None where that cannot be."""
    with suppress(OSError), mmap.mmap(-1, _CHUNK) as buffer:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            return _timed_read(descriptor, buffer)
        finally:
            os.close(descriptor)
    return None


def _timed_read(descriptor: int, buffer: mmap.mmap) -> float | None:
    count, begun = 0, time.monotonic()
    while count < _SAMPLE and time.monotonic() - begun < _SAMPLE_S:
        got = os.readv(descriptor, [buffer])
        count += got
        if got < _CHUNK:
            break
    return count / max(time.monotonic() - begun, 1e-6) if count else None
