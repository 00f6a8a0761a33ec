"""All checks, in the order of the report."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge import __version__
from edge.config import Settings, load_settings
from edge.doctor.broker import examine_broker
from edge.doctor.check import Check
from edge.doctor.clock import examine_clock
from edge.doctor.disk import examine_disk
from edge.doctor.memory import examine_memory
from edge.doctor.network import examine_network
from edge.doctor.processor import examine_processor
from edge.doctor.runtime import Served, examine_bundle, examine_software, examine_starts
from edge.doctor.service_manager import examine_service_manager
from edge.errors import ConfigError, QwedgeError
from edge.machine import Host
from edge.settings.folders import state_folder, store_folder


@dataclass(frozen=True)
class Report:
    """What was found."""

    checks: tuple[Check, ...]
    settings: Settings | None
    """None where they cannot be used; the checks went by the defaults then."""
    served: Served | None
    """What a start would serve."""

    @property
    def ok(self) -> bool:
        """Whether qwedge can serve here."""
        return all(check.status != "fail" for check in self.checks)

    def document(self) -> dict[str, Any]:
        """The report as JSON."""
        return {"ok": self.ok, "version": __version__, "checks": [asdict(check) for check in self.checks]}

    def text(self) -> str:
        """The report for people: a line for each check, and a second one where something is to be changed."""
        return "\n".join(_line(check) for check in self.checks)


def examine(config: Path | None, host: Host | None = None, *, measure: bool = True) -> Report:
    """Look at everything.

    Args:
        config: the settings' file, if any. Settings that cannot be used are a failed check; the rest uses the defaults.
        host: where the machine tells of itself.
        measure: whether to measure memory and disk, which takes two seconds, and to connect to the configured broker.
    """
    host = host or Host()
    settings, setting_check = _settings(config)
    chosen = settings or Settings.model_validate({section: {} for section in Settings.model_fields})
    bundle_checks, served = examine_bundle(host, chosen)
    checks = (
        *examine_software(),
        *examine_processor(host),
        *examine_memory(host, measure=measure, need=None if served is None else served.need_bytes(host, chosen)),
        setting_check,
        *bundle_checks,
        *_places(host, chosen, served, measure=measure),
        *examine_network(chosen),
        *examine_broker(chosen, connect=measure),
        *examine_clock(chosen),
        *examine_service_manager(host),
    )
    return Report(checks, settings, served)


def _settings(config: Path | None) -> tuple[Settings | None, Check]:
    try:
        settings = load_settings(config, os.environ)
    except QwedgeError as error:
        return None, Check("settings", "fail", error.message, error.hint)
    return settings, Check("settings", "ok", str(config or "defaults and environment"))


def _places(host: Host, settings: Settings, served: Served | None, *, measure: bool) -> list[Check]:
    """The folders of bundles and state."""
    try:
        folder = served.path if served is not None else store_folder(settings.model, os.environ)
        disk = examine_disk(host, folder, served.weights if served is not None and measure else None)
        return [*disk, _state(state_folder(os.environ)), *examine_starts(settings)]
    except ConfigError as error:
        return [Check("state", "fail", error.message, error.hint)]


def _state(folder: Path) -> Check:
    """Whether what has to outlive a restart can be written."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        return Check("state", "ok", f"{folder}")
    hint = "run this as the user that qwedge runs as, or give it a folder that it may write (StateDirectory=)"
    return Check("state", "warn", f"{folder} cannot be written: MQTT takes no request, no model is installed", hint)


def _line(check: Check) -> str:
    line = f"{check.status:<5} {check.name:<12} {check.detail}"
    return f"{line}\n{'':<18} -> {check.hint}" if check.hint else line
