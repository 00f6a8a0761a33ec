"""The software: Python, onnxruntime, the bundle, and how the last start went."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.bundle import WEIGHTS, Manifest, read_manifest
from edge.config import Settings
from edge.doctor.check import Check
from edge.doctor.processor import INT8_FEATURE
from edge.engine.providers import choose, survey
from edge.errors import BundleError, ConfigError, QwedgeError
from edge.machine import Host, isa_features
from edge.planning.graph_file import read_shape
from edge.planning.machine import has_int8_kernels
from edge.planning.memory import Serving, one_conversation, predict_memory
from edge.settings.folders import device_folder, store_folder
from edge.starts import MAX_DEATHS, read_starts
from edge.store import Store
from edge.trust import trust_of


@dataclass(frozen=True)
class Served:
    """The bundle that a start would serve."""

    path: Path
    manifest: Manifest

    @property
    def weights(self) -> Path:
        """Its largest file."""
        return self.path / WEIGHTS

    def need_bytes(self, host: Host, settings: Settings) -> int | None:
        """Memory that it takes for a single conversation; None where its graph does not tell."""
        try:
            shape = read_shape(self.path, self.manifest)
        except BundleError:
            return None
        serving = one_conversation(Serving.of(settings.engine, self.manifest))
        return predict_memory(shape, serving, int8=has_int8_kernels(isa_features(host))).peak


def find_served(settings: Settings) -> Served | None:
    """What a start would serve; None where nothing is configured or active.

    Raises:
        BundleError: its manifest cannot be used.
        StoreError: the store cannot be read.
        ConfigError: the user has no home to have a store in.
    """
    trust = trust_of(settings.model)
    path = settings.model.bundle or Store(store_folder(settings.model, os.environ), trust=trust).active_path()
    return None if path is None else Served(path, read_manifest(path, trust=trust))


def examine_software() -> list[Check]:
    """What there is to say about Python and onnxruntime."""
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return [Check("python", "ok", python), _onnxruntime(), _providers()]


def _onnxruntime() -> Check:
    # In a process of its own: on a processor that it was not built for, the import ends in an illegal instruction.
    code = "import onnxruntime as o; print(o.__version__, *o.get_available_providers())"
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    probe = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    if probe.returncode < 0:
        hint = f"this processor cannot run the installed package ({signal.Signals(-probe.returncode).name})"
        return Check("onnxruntime", "fail", "crashes when it is imported", hint)
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("onnxruntime", "fail", f"cannot be imported: {reason}", "pip install onnxruntime")
    version, *providers = probe.stdout.split()
    names = ", ".join(provider.removesuffix("ExecutionProvider") for provider in providers)
    return Check("onnxruntime", "ok", f"{version} with {names}")


def _providers() -> Check:
    """What could compute here besides the processor, and why the others could not."""
    found = [finding for finding in survey() if finding.provider != "cpu"]
    usable = [finding for finding in found if finding.usable]
    if usable:
        return Check("gpu", "ok", "; ".join(f"{finding.provider}: {finding.reason}" for finding in usable))
    return Check("gpu", "ok", f"none ({'; '.join(f'{finding.provider}: {finding.reason}' for finding in found)})")


def examine_bundle(host: Host, settings: Settings) -> tuple[list[Check], Served | None]:
    """What there is to say about the bundle that would be served, and which one it is."""
    try:
        served = find_served(settings)
    except QwedgeError as error:
        return [Check("bundle", "fail", error.message, error.hint)], None
    if served is None:
        hint = "qwedge install DIR --activate, or qwedge serve --bundle DIR"
        return [Check("bundle", "warn", "none configured, none active", hint)], None
    manifest = served.manifest
    detail = f"{manifest.name} {manifest.version} (`qwedge verify {served.path}` checks every byte)"
    return [Check("bundle", "ok", detail), _provider(settings, manifest), _recipe(host, manifest)], served


def _provider(settings: Settings, manifest: Manifest) -> Check:
    """What would compute the bundle."""
    try:
        chosen = choose(settings.engine.provider, manifest.target)
    except ConfigError as error:
        return Check("provider", "fail", error.message, error.hint)
    return Check("provider", "ok", f"{chosen.name}: {chosen.reason}")


def _recipe(host: Host, manifest: Manifest) -> Check:
    """Whether the weights' formats suit this processor's kernels."""
    name, needed, found = manifest.recipe.get("name", "unnamed"), INT8_FEATURE.get(host.machine), isa_features(host)
    if needed is None or has_int8_kernels(found):
        return Check("recipe", "ok", f"{name} suits this processor")
    bits = {part["bits"] for part in (*_formats(manifest.recipe.get("layer")), *_formats(manifest.recipe.get("head")))}
    if 8 in bits:
        hint = "export it again with --recipe nodot, for processors without"
        return Check("recipe", "warn", f"{name} has weights of 8 bits: many times slower without {needed}", hint)
    return Check("recipe", "ok", f"{name}; without {needed} its weights are computed in floating point")


def _formats(part: Any) -> list[Mapping[str, Any]]:
    """The formats with a number of bits in a recipe, however deep."""
    if not isinstance(part, Mapping):
        return []
    own = [part] if isinstance(part.get("bits"), int) else []
    return [*own, *(found for inner in part.values() for found in _formats(inner))]


def examine_starts(settings: Settings) -> list[Check]:
    """How the last start went.

    Raises:
        ConfigError: the user has no home to keep state in.
    """
    starts = read_starts(device_folder(settings.mqtt, os.environ))
    if starts.unproven > MAX_DEATHS:
        hint = "see the log of the first crash; a restart by hand leaves safe mode (docs/operations.md)"
        return [Check("last start", "warn", f"{starts.unproven - 1} in a row ended by themselves: safe mode", hint)]
    if starts.unproven > 1:
        detail = f"{starts.unproven - 1} before it, in a row, ended by themselves"
        return [Check("last start", "warn", detail, "see the log: journalctl -u qwedge")]
    if starts.ready_s is None:
        return [Check("last start", "ok", "none that worked is known")]
    return [Check("last start", "ok", f"{starts.bundle} answered after {starts.ready_s:.1f} s")]
