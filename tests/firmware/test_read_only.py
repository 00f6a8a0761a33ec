"""The service where nothing can be written, with and without a folder for its state: a root that is read-only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import MANIFEST
from tests.edge.managed import export_two
from tests.firmware.tools import attempt, namespace

# Everything but a tmpfs is read-only; as with ProtectSystem=strict and PrivateTmp=, and on an image that is.
READ_ONLY = """
mount -t tmpfs none /run && mkdir /run/tmp /run/state /run/full || exit 99
mount -t tmpfs -o size=64k none /run/full && head -c 1M /dev/zero >/run/full/filler 2>/dev/null
mount -o remount,bind,ro / || exit 99
touch /nobody-can-write-this 2>/dev/null && exit 98
exec "$@"
"""
SESSION = Path(__file__).with_name("service_session.py")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = export_two(tmp_path_factory.mktemp("bundles")) / "first"
    assert (bundle / MANIFEST).exists()
    return bundle


def serve(bundle: Path, state: str) -> dict[str, Any]:
    """Serve with a broker, answer a request, leave."""
    line = [sys.executable, SESSION, sys.executable, "-B", "-m", "edge.cli", "serve", "--bundle", bundle]
    done = attempt(
        *namespace(mounts=True),
        *("sh", "-c", READ_ONLY, "sh", *line, "--broker", "embedded", "--threads", "1"),
        env={"TMPDIR": "/run/tmp", "STATE_DIRECTORY": state, "HOME": "/nowhere"},
    )
    assert done.returncode == 0, done.stdout
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.broker
def test_a_read_only_root_with_a_state_folder_takes_nothing_away(bundle: Path) -> None:
    session = serve(bundle, "/run/state")
    assert (session["tokens"], session["status"], session["health"]["status"]) == (4, 0, "ok"), session["log"]


@pytest.mark.broker
@pytest.mark.parametrize(
    ("state", "why"),
    [("/var/lib/qwedge-is-not-there", "Read-only file system"), ("/run/full", "full")],
)
def test_without_room_for_its_state_it_serves_and_says_what_is_missing(bundle: Path, state: str, why: str) -> None:
    session = serve(bundle, state)
    assert (session["tokens"], session["status"], session["health"]["status"]) == (4, 0, "degraded"), session["log"]
    assert why in session["health"]["problem"]
    assert f"starts are not counted, {state}" in session["log"]
    assert "Traceback" not in session["log"]
