"""Scores in a bundle's manifest: what was measured once, on a machine with time, need not be measured on every device.

``measured.evaluations`` holds a report's summary for each suite. A score counts as long as the suite is the same, to
the last question; and only who trusts the manifest's signature should take its word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from edge.bundle import MANIFEST, Manifest, read_manifest, read_signature
from edge.durable import replace_durably
from edge.errors import BundleError
from edge.evaluation.report import Report
from edge.evaluation.suite import Suite

KEY: Final = "evaluations"


def check_recordable(bundle: Path) -> Manifest:
    """Look whether a score can be recorded, before the long work; gives the manifest.

    Raises:
        BundleError: the bundle is signed, or its manifest cannot be read.
    """
    if read_signature(bundle) is not None:
        hint = "record first, then sign it: qwedge sign"
        raise BundleError(f"{bundle} is signed: its manifest must stay as it is", hint=hint)
    return read_manifest(bundle)


def record(bundle: Path, report: Report) -> None:
    """Put a report's summary into the manifest, in place of an older one of the same suite.

    Raises:
        BundleError: the bundle is signed, or its manifest cannot be read or written.
    """
    manifest = check_recordable(bundle)
    measured = {**manifest.measured, KEY: {**_all(manifest), report.suite: report.summary()}}
    value = manifest.model_copy(update={"measured": measured}).model_dump(mode="json")
    try:
        replace_durably(bundle / MANIFEST, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        reason = f"the manifest of {bundle} cannot be written: {error.strerror}"
        raise BundleError(reason, hint="is it on a disk that can be written?") from None


def recorded_score(manifest: Manifest, suite: Suite) -> float | None:
    """What the manifest says that its bundle scored; None where it says nothing of this suite as it is now."""
    summary = _all(manifest).get(suite.name)
    if not isinstance(summary, dict) or summary.get("suite_digest") != suite.digest:
        return None
    score = summary.get("score")
    return float(score) if isinstance(score, int | float) else None


def _all(manifest: Manifest) -> dict[str, Any]:
    known = manifest.measured.get(KEY)
    return known if isinstance(known, dict) else {}
