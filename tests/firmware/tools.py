"""The real tools that check files of ``firmware-configs/``, and empty network namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
FIRMWARE: Final = ROOT / "firmware-configs"
COMMON: Final = FIRMWARE / "common"
BOARDS: Final = tuple(sorted(path.parent.name for path in FIRMWARE.glob("*/edge.toml")))
SYSTEM_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/lib/systemd:/usr/lib/systemd"
TIMEOUT_S: Final = 300


def need(tool: str, package: str) -> str:
    """The path of a tool; without it the test is skipped, or fails in CI."""
    found = shutil.which(tool, path=SYSTEM_PATH)
    if found is None:
        missing(f"this test needs {tool}: apt-get install {package}")
    return str(found)


def missing(reason: str) -> None:
    """Skip the test, or fail where nothing may be left out."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a tool that must succeed; returns what it says on both outputs."""
    done = attempt(*command, env=env, cwd=cwd)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def attempt(
    *command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool that may fail."""
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def namespace(*, mounts: bool = False) -> tuple[str, ...]:
    """What runs a command in a network of its own, in which there is nothing but a loopback that is down."""
    flags = ["--net", *(["--mount"] if mounts else []), *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    command = (need("unshare", "util-linux"), *flags)
    if attempt(*command, "true").returncode != 0:
        missing("this test needs to make network namespaces: run it as root, or allow user namespaces")
    return command
