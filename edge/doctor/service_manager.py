"""systemd: who starts the service again, and whether somebody notices when it hangs."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Final

from edge.doctor.check import Check
from edge.machine import Host

UNIT: Final = "qwedge.service"
_ASKED: Final = ("LoadState", "ActiveState", "SubState", "NRestarts", "Result", "WatchdogUSec", "MemoryMax")


def examine_service_manager(host: Host) -> list[Check]:
    """What there is to say about systemd and our unit."""
    if not (host.root / "run/systemd/system").exists():
        return [Check("systemd", "ok", "does not run here: whoever starts qwedge has to start it again after a crash")]
    return [judge(unit_state())]


def unit_state() -> dict[str, str]:
    """What systemd says of the unit; empty where it cannot be asked."""
    tool = shutil.which("systemctl")
    if tool is None:
        return {}
    line = [tool, "show", UNIT, *(f"--property={name}" for name in _ASKED)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=10, check=False)
    return dict(re.findall(r"^(\w+)=(.*)$", done.stdout, re.MULTILINE))


def judge(state: dict[str, str]) -> Check:
    """What a unit's state means."""
    if state.get("LoadState") != "loaded":
        hint = "firmware-configs/install.sh makes the unit, which starts it with the machine and after a crash"
        return Check("systemd", "ok", f"there is no unit {UNIT}; {hint}")
    detail = f"{UNIT} is {state.get('ActiveState')} ({state.get('SubState')}), {state.get('NRestarts')} restarts"
    if state.get("ActiveState") == "failed":
        return Check("systemd", "warn", f"{detail}, {state.get('Result')}", f"journalctl -u {UNIT} -n 50 says why")
    if state.get("WatchdogUSec") in {"0", "infinity", None}:
        hint = "WatchdogSec=3min in the unit: a process that hangs is ended and started again"
        return Check("systemd", "warn", f"{detail}, no watchdog", hint)
    if state.get("NRestarts", "0") != "0":
        return Check("systemd", "warn", f"{detail}, watchdog {state['WatchdogUSec']}", f"journalctl -u {UNIT} says why")
    return Check("systemd", "ok", f"{detail}, watchdog {state['WatchdogUSec']}")
