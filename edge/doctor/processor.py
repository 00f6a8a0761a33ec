"""The processor: what it can do, what is hidden from us, and what slows it down."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from typing import Final

import psutil

from edge.doctor.check import Check
from edge.machine import Host, cpu_model, cpu_quota, isa_features, usable_threads
from edge.planning.machine import has_int8_kernels

INT8_FEATURE: Final = {"x86_64": "avx2", "aarch64": "asimddp"}
"""What :func:`edge.planning.machine.has_int8_kernels` looks for; without it they are several times slower."""
WARM_C: Final = 75
"""Boards begin to lower their clock at 80 to 85 degrees."""
_PI_NOW: Final = {0: "too little voltage", 1: "the clock is limited", 2: "throttled", 3: "the soft limit of heat"}
"""Bits of a Raspberry Pi's ``get_throttled``; 16 higher are the same since it was switched on [1].

[1] https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
"""
_PI_FILE: Final = "sys/devices/platform/soc/soc:firmware/get_throttled"


def examine_processor(host: Host) -> list[Check]:
    """What there is to say about the processor."""
    return [_cores(host), _instructions(host), _governor(host), _heat(host), *_throttled(host)]


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
    capped = [name for name in names if _is_capped(host, name.rpartition("/")[0])]
    if capped:
        hint = "raise scaling_max_freq, or leave the power mode that limits it"
        return Check("clock speed", "warn", f"{detail}; limited below what the processor can do", hint)
    if governors == ["performance"]:
        return Check("clock speed", "ok", detail)
    hint = "each answer begins slowly: systemctl enable --now qwedge-power (not on a battery)"
    return Check("clock speed", "warn", detail, hint)


def _is_capped(host: Host, policy: str) -> bool:
    now, most = host.number(f"{policy}/scaling_max_freq"), host.number(f"{policy}/cpuinfo_max_freq")
    return now is not None and most is not None and now < most


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


def _throttled(host: Host) -> list[Check]:
    """What the firmware of a Raspberry Pi, or an x86 processor, says of having slowed down."""
    if (flags := _pi_flags(host)) is not None:
        return [_pi_check(flags)]
    counts = [host.number(name) for name in host.names("sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")]
    times = max((count for count in counts if count is not None), default=None)
    if times is None:
        return []
    if times == 0:
        return [Check("throttling", "ok", "none since the start")]
    return [Check("throttling", "warn", f"{times} times since the start, for heat", "cool the device")]


def _pi_check(flags: int) -> Check:
    now = [text for bit, text in _PI_NOW.items() if flags >> bit & 1]
    before = [text for bit, text in _PI_NOW.items() if flags >> (bit + 16) & 1]
    if not now and not before:
        return Check("throttling", "ok", "none since the start")
    hint = "cool the board"
    if flags & 0x10001:
        hint = "take a stronger power supply and a shorter cable"
    when = f"now: {', '.join(now)}" if now else f"since the start: {', '.join(before)}"
    return Check("throttling", "warn", when, hint)


def _pi_flags(host: Host) -> int | None:
    text = host.text(_PI_FILE)
    if not text and host.root.samefile("/") and platform.machine() == "aarch64" and (tool := shutil.which("vcgencmd")):
        done = subprocess.run([tool, "get_throttled"], capture_output=True, text=True, timeout=5, check=False)
        text = done.stdout.strip().rpartition("=0x")[2]
    return int(text, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", text) else None
