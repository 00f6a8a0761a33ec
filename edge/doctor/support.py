"""The support bundle: what somebody needs who helps from afar, and nothing that is nobody's business.

Never in it: prompts, answers, keys, passwords, certificates, weights, names of hosts, devices and people
(:mod:`edge.doctor.redaction`). docs/doctor.md lists what is in it.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from edge.config import ENV_PREFIX, Settings
from edge.doctor.check import Check
from edge.doctor.disk import disk_kind, file_system
from edge.doctor.redaction import Redaction
from edge.doctor.report import Report
from edge.doctor.running import ask_running
from edge.doctor.service_manager import UNIT, unit_state
from edge.errors import ConfigError, QwedgeError
from edge.http.private_file import write_file
from edge.machine import Host, cgroups
from edge.power import EnergyMeter
from edge.sbom import package_sbom
from edge.settings.folders import broker_folder, device_folder, evaluations_folder, journal_folder, store_folder
from edge.starts import read_starts
from edge.store import Store
from edge.store.state import StateFile

FOLDER: Final = "qwedge-support"
MAX_LOG_LINES: Final = 500
MAX_LINE: Final = 2000
"""Characters of one line of the log."""
_PROC: Final = (
    "proc/cpuinfo",
    "proc/meminfo",
    "proc/loadavg",
    "proc/uptime",
    "proc/swaps",
    "proc/pressure/cpu",
    "proc/pressure/io",
    "proc/pressure/memory",
    "proc/sys/kernel/osrelease",
    "proc/sys/vm/overcommit_memory",
    "proc/sys/vm/swappiness",
    "proc/device-tree/model",
    "etc/os-release",
)
"""Not the kernel's command line, the mounts and the interfaces: they have serial numbers, hosts and addresses."""
_CGROUP: Final = ("memory.max", "memory.high", "memory.current", "memory.peak", "memory.events", "cpu.max")
_SERIAL: Final = re.compile(r"^(Serial|Revision)\s*:.*\n?", re.MULTILINE)

Files = dict[str, Any]
"""Names and contents: texts, or JSON values."""


def write_support_bundle(path: Path, report: Report) -> None:
    """Write a support bundle, for this user alone (0600).

    Args:
        path: a new file: what is there is never replaced.
        report: what the doctor found.

    Raises:
        ConfigError: the file is there already, or cannot be written.
    """
    data = pack(collect(report, Host(), dict(os.environ)))
    try:
        # The name is taken first: what is replaced then is nobody else's, on file systems without links too.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise ConfigError(f"{path} is there already", hint="name a new file") from None
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        write_file(path, data)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be written: {error.strerror}", hint="name a file in a folder with room")


def collect(report: Report, host: Host, env: dict[str, str]) -> Files:
    """What the bundle holds. Settings that cannot be used leave out all that could not be redacted by them."""
    if report.settings is None:
        only = [check for check in report.checks if check.name == "settings"]
        return {"report.json": _without_settings(report, only), "proc": _proc(host)}
    redaction, settings = Redaction(report.settings, env), report.settings
    running = ask_running(settings.server)
    files: Files = {
        "report.json": report.document(),
        "report.txt": report.text(),
        "settings.json": {"settings": redaction.settings(), "environment": sorted(_names_of_ours(env))},
        "versions.json": _versions(),
        "manifest.json": None if report.served is None else _manifest(report),
        "store.json": _store(settings, env),
        "state.json": _state(settings, env, host),
        "sensors.json": _sensors(host),
        "systemd.json": unit_state(),
        "log.txt": journal_lines(),
        "proc": _proc(host),
        **{f"running{name}": page.text if name == "/metrics" else page.json() for name, page in running.items()},
    }
    return {name: redaction.value(content) for name, content in files.items()}


def _without_settings(report: Report, failed: list[Check]) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "checks": [asdict(check) for check in failed],
        "left_out": "all that settings make private",
    }


def _names_of_ours(env: Mapping[str, str]) -> Iterator[str]:
    """Variables that set something; never their values, which are the settings'."""
    return (name for name in env if name.startswith(ENV_PREFIX))


def _versions() -> dict[str, str]:
    sbom = package_sbom()
    found = [sbom["metadata"]["component"], *sbom["components"]]
    return {component["name"]: component["version"] for component in found}


def _manifest(report: Report) -> dict[str, Any]:
    assert report.served is not None
    manifest = report.served.manifest.model_dump(mode="json")
    manifest["measured"].pop("self_test", None)  # it has a prompt; the exporter's, but there is to be none
    return manifest


def _store(settings: Settings, env: dict[str, str]) -> dict[str, Any]:
    """What is installed and what the store remembers."""
    folder = store_folder(settings.model, env)
    try:
        bundles = [installed.describe() for installed in Store(folder).list()]
        return {"bundles": bundles, "state": StateFile(folder).read().model_dump(mode="json")}
    except (QwedgeError, OSError) as error:
        return {"problem": str(error)}


def _state(settings: Settings, env: dict[str, str], host: Host) -> dict[str, Any]:
    """How the last starts went, and how much there is in each folder; not what."""
    folders = {
        "models": store_folder(settings.model, env),
        "journal": journal_folder(settings.mqtt, env),
        "broker": broker_folder(settings.mqtt, env),
        "prefixes": settings.engine.prefix_store,
        "evaluations": evaluations_folder(env),
    }
    found = {name: folder.expanduser() for name, folder in folders.items() if folder is not None}
    return {
        "starts": read_starts(device_folder(settings.mqtt, env)).model_dump(mode="json"),
        "folders": {name: _amount(folder, host) for name, folder in found.items() if folder.is_dir()},
    }


def _amount(folder: Path, host: Host) -> dict[str, Any]:
    sizes = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            sizes.append(path.lstat().st_size)
    place = {"disk": disk_kind(host, folder), "file_system": file_system(host, folder)}
    return {"files": len(sizes), "bytes": sum(sizes), **place}


def _sensors(host: Host) -> dict[str, Any]:
    zones = list(host.names("sys/class/thermal/thermal_zone*"))
    cooling = {name: host.number(f"{name}/cur_state") for name in host.names("sys/class/thermal/cooling_device*")}
    meter = EnergyMeter(host.root / "sys")
    return {
        "zones": [{"type": host.text(f"{zone}/type"), "millidegrees": host.number(f"{zone}/temp")} for zone in zones],
        "cooling": cooling,
        "clocks": {
            name: host.text(name) for name in host.names("sys/devices/system/cpu/cpufreq/policy*/scaling_*_freq")
        },
        "measures_energy": meter.is_there,
        "power_w": meter.power_w(),
    }


def _proc(host: Host) -> str:
    names = [*_PROC, *(f"{folder}/{name}" for folder in cgroups(host) for name in _CGROUP)]
    texts = ((name, _SERIAL.sub("", host.text(name))) for name in names)
    return "\n".join(f"== {name}\n{text}\n" for name, text in texts if text)


def journal_lines() -> str:
    """The service's last lines in systemd's journal, where it has one that we may read."""
    tool = shutil.which("journalctl")
    if tool is None:
        return "there is no journalctl\n"
    line = [tool, "--unit", UNIT, "--lines", str(MAX_LOG_LINES), "--output", "short-iso", "--no-hostname", "--no-pager"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"journalctl: {error}\n"
    return "".join(f"{text[:MAX_LINE]}\n" for text in (done.stdout or done.stderr).splitlines())


def pack(files: Files) -> bytes:
    """Make a compressed tar file; its entries have no owner and no time."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            data = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size, entry.mode = len(data), 0o600
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()
