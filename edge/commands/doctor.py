"""``qwedge doctor``: can this machine serve, and what should be changed?"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from edge import __version__
from edge.bundle import read_manifest
from edge.commands import machine
from edge.commands.loading import store_of
from edge.commands.options import Config, Json, print_json, settings
from edge.config import Settings
from edge.errors import QwedgeError, UnavailableError
from edge.trust import trust_of

Status = Literal["ok", "warn", "fail"]

INT8_FEATURE = {"x86_64": "avx2", "aarch64": "asimddp"}
"""Without it the engine falls back to floating-point kernels: several times slower."""
MIN_FREE_RAM = 1 << 30
"""Bytes; the 0.5B model in 4 bits needs about 700 MB."""
MIN_FREE_DISK = 2 << 30
"""Bytes; an export of the 0.5B model needs its download and its bundle."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    detail: str
    hint: str = ""
    """What to change; empty when there is nothing."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(*, config: Config = None, as_json: Json = False) -> None:
    """Check what this machine can do.

    Looks at packages, processor, memory, disk, broker and ports, and says what to change; exits with 1 if qwedge cannot
    serve here.
    """
    checks = examine(config)
    failed = any(check.status == "fail" for check in checks)
    if as_json:
        print_json({"ok": not failed, "version": __version__, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            print(_line(check))
    if failed:
        raise typer.Exit(1)


def examine(config: Path | None) -> list[Check]:
    """All checks, in the order of the report; a settings error is a failed check and the rest uses the defaults."""
    try:
        chosen, setting_check = settings(config), Check("settings", "ok", str(config or "defaults and environment"))
    except QwedgeError as error:
        setting_check = Check("settings", "fail", error.message, error.hint)
        chosen = Settings.model_validate({section: {} for section in Settings.model_fields})
    of_machine: list[Callable[[], Check]] = [_python, _onnxruntime, _cpu, _isa, _memory]
    return [
        *(check() for check in of_machine),
        setting_check,
        _bundle(chosen),
        _disk(chosen.model.bundle or store_of(chosen).folder),
        _mosquitto(),
        _port("http port", chosen.server.host, chosen.server.port, "--port"),
        _port("mqtt port", "127.0.0.1", chosen.mqtt.port, "QWEDGE_MQTT_PORT"),
    ]


def _line(check: Check) -> str:
    line = f"{check.status:<5} {check.name:<12} {check.detail}"
    return f"{line}\n{'':<18} -> {check.hint}" if check.hint else line


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _onnxruntime() -> Check:
    # In a process of its own: on a processor that it was not built for, the import ends in an illegal instruction.
    code = "import onnxruntime as o; print(o.__version__, *o.get_available_providers())"
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if probe.returncode < 0:
        hint = f"this processor cannot run the installed package ({signal.Signals(-probe.returncode).name})"
        return Check("onnxruntime", "fail", "crashes when it is imported", hint)
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("onnxruntime", "fail", f"cannot be imported: {reason}", "pip install onnxruntime")
    version, *providers = probe.stdout.split()
    return Check(
        "onnxruntime", "ok", f"{version} ({', '.join(p.removesuffix('ExecutionProvider') for p in providers)})"
    )


def _cpu() -> Check:
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0))
    return Check("cpu", "ok", f"{machine.cpu_model()}, {cores} cores, {usable} usable threads")


def _isa() -> Check:
    found = machine.isa_features()
    needed = INT8_FEATURE.get(platform.machine())
    detail = " ".join(found) or "none known"
    if needed is None or needed in found:
        return Check("instructions", "ok", detail)
    hint = f"this processor lacks {needed}: quantized models run several times slower; take a small model"
    return Check("instructions", "warn", detail, hint)


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{_gib(memory.available)} available of {_gib(memory.total)}"
    if memory.available < MIN_FREE_RAM:
        return Check("memory", "warn", detail, "stop other programs, or lower engine.slots and engine.context")
    return Check("memory", "ok", detail)


def _bundle(chosen: Settings) -> Check:
    try:
        bundle = chosen.model.bundle or store_of(chosen).active_path()
        if bundle is None:
            return Check("bundle", "ok", "none configured, none active")
        manifest = read_manifest(bundle, trust=trust_of(chosen.model))
    except QwedgeError as error:
        return Check("bundle", "fail", error.message, error.hint)
    return Check("bundle", "ok", f"{manifest.name} {manifest.version} (`qwedge verify {bundle}` checks every byte)")


def _disk(folder: Path) -> Check:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{_gib(free)} free in {folder}"
    if free < MIN_FREE_DISK:
        return Check("disk", "warn", detail, "free some space before exporting or copying a model")
    return Check("disk", "ok", detail)


def _mosquitto() -> Check:
    from edge.mqtt.broker_program import find_mosquitto, mosquitto_version

    try:
        path = find_mosquitto()
        version = ".".join(map(str, mosquitto_version(path)))
    except UnavailableError as error:
        return Check("mosquitto", "warn", f"{error.message}; HTTP works without", error.hint)
    return Check("mosquitto", "ok", f"{version} at {path}")


def _port(name: str, host: str, port: int, flag: str) -> Check:
    if port == 0:
        return Check(name, "ok", "any free one")
    try:
        socket.create_server((host.strip("[]"), port), family=_family(host)).close()
    except OSError as error:
        hint = f"a running qwedge, perhaps? otherwise stop what uses it, or choose another with {flag}"
        return Check(name, "warn", f"{host}:{port} cannot be used: {error.strerror}", hint)
    return Check(name, "ok", f"{host}:{port} is free")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
