"""The processor: what it can do, what is hidden from us, and what slows it down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import psutil

from edge.cooling import Limit, throttling
from edge.doctor.check import Check
from edge.machine import Host, cpu_model, cpu_quota, isa_features, usable_threads
from edge.planning.machine import has_int8_kernels

INT8_FEATURE: Final = {"x86_64": "avx2", "aarch64": "asimddp"}
"""What :func:`edge.planning.machine.has_int8_kernels` looks for; without it they are several times slower."""
WARM_C: Final = 75
"""Boards begin to lower their clock at 80 to 85 degrees."""
_LIMITS: Final[dict[Limit, str]] = {
    "under_voltage": "too little voltage",
    "clock_capped": "the clock is limited",
    "throttled": "throttled",
    "hot": "slowed down for heat",
    "over_current": "too much current",
}


def examine_processor(host: Host) -> list[Check]:
    """What there is to say about the processor."""
    return [_cores(host), _instructions(host), _governor(host), _heat(host), _throttling(host)]


def _cores(host: Host) -> Check:
    cores, threads = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1, usable_threads()
    detail = f"{cpu_model(host)}, {cores} cores, {threads} usable threads"
    quota, fast = cpu_quota(host), _fast_cores(host)
    if quota is not None and quota < min(cores, threads):
        hint = f"engine.threads = {max(1, round(quota))}: more threads than processor time wait for each other"
        return Check("cpu", "warn", f"{detail}, time of {quota:g}", hint)
    if fast is not None:
        detail += f", {fast} of them fast (engine.threads = {fast} and the unit's CPUAffinity= keep to those)"
    return Check("cpu", "ok", detail)


def _fast_cores(host: Host) -> int | None:
    """How many cores are of the fastest kind; None where all are alike."""
    found = [host.number(name) for name in host.names("sys/devices/system/cpu/cpu[0-9]*/cpu_capacity")]
    known = [capacity for capacity in found if capacity is not None]
    # Boards list a prime core or two a few percent above the other fast ones.
    fast = sum(capacity >= 0.9 * max(known) for capacity in known)
    return fast if fast < len(known) else None


def _instructions(host: Host) -> Check:
    found = isa_features(host)
    needed = INT8_FEATURE.get(host.machine)
    detail = " ".join(found) or "none known"
    if hidden := _hidden(host):
        hint = "let the process see it (unit: no ProcSubset=pid, container: /proc and /sys read-only, not masked)"
        return Check("instructions", "warn", f"{detail}; {hidden} is hidden: onnxruntime takes slow kernels", hint)
    if needed is None or has_int8_kernels(found):
        return Check("instructions", "ok", detail)
    hint = "take a small model"
    if host.machine == "aarch64":
        hint += ", exported with --recipe nodot"
    return Check("instructions", "warn", f"{detail}; without {needed} quantized models run several times slower", hint)


def _hidden(host: Host) -> str:
    """What onnxruntime reads to know an ARM core and cannot; on x86 it asks the processor itself."""
    if host.machine != "aarch64":
        return ""
    if not host.text("sys/devices/system/cpu/possible"):
        return "/sys/devices/system/cpu"
    return "" if re.search(r"^Features\s*:", host.text("proc/cpuinfo"), re.MULTILINE) else "/proc/cpuinfo"


def _governor(host: Host) -> Check:
    names = list(host.names("sys/devices/system/cpu/cpufreq/policy*/scaling_governor"))
    governors = sorted({host.text(name) for name in names} - {""})
    if not governors:
        return Check("clock speed", "ok", "no governor here: somebody else decides (a hypervisor, the firmware)")
    detail = f"governor {', '.join(governors)}"
    if governors == ["performance"]:
        return Check("clock speed", "ok", detail)
    hint = "each answer begins slowly: systemctl enable --now qwedge-power (not on a battery)"
    return Check("clock speed", "warn", detail, hint)


def _heat(host: Host) -> Check:
    zones = {name.split("/")[-2]: host.number(name) for name in host.names("sys/class/thermal/thermal_zone*/temp")}
    degrees = {zone: round(value / 1000) for zone, value in zones.items() if value is not None and value > 0}
    if not degrees:
        return Check("heat", "ok", "no sensor")
    zone, hottest = max(degrees.items(), key=lambda item: item[1])
    detail = f"{hottest} °C ({host.text(f'sys/class/thermal/{zone}/type') or zone})"
    if hottest >= WARM_C:
        return Check("heat", "warn", detail, "cool the board: it will lower its clock")
    return Check("heat", "ok", detail)


def _throttling(host: Host) -> Check:
    """What holds the clock down, or has done so, as firmware and kernel tell it."""
    found = throttling(host.root / "sys")
    if not found.now and not found.since_boot:
        return Check("throttling", "ok", "none since the start, as far as anybody tells")
    limits = found.now or found.since_boot
    when = "now" if found.now else "since the start"
    return Check("throttling", "warn", f"{when}: {', '.join(_LIMITS[limit] for limit in limits)}", _remedy(limits))


def _remedy(limits: Sequence[Limit]) -> str:
    if {"under_voltage", "over_current"} & {*limits}:
        return "take a stronger power supply and a shorter cable"
    if {*limits} == {"clock_capped"}:
        return "raise scaling_max_freq, or leave the power mode that limits it"
    return "cool the board"
