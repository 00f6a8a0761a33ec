"""The offline kit of a board, its installer, and the service that comes out of them."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.edge.managed import export_two
from tests.firmware.test_systemd import UNIT, directives
from tests.firmware.tools import FIRMWARE, ROOT, attempt, missing, namespace, need, run

BOARD = "x86-n100"
# A machine of our own to install on: what is written goes to memory, systemd is asked by name and answers nothing.
REAL_PATHS = """
mount -t tmpfs none "$1"
for name in etc opt var usr/local; do
    mkdir -p "$1/$name/upper" "$1/$name/work"
    mount -t overlay none -o "lowerdir=/$name,upperdir=$1/$name/upper,workdir=$1/$name/work" "/$name" || exit 99
done
mkdir -p /opt/qwedge && mount --bind "$2" /opt/qwedge
mount -t tmpfs none /run && mkdir -p /run/systemd/system /run/bin
for tool in systemctl sysctl; do
    echo '#!/bin/sh' >/run/bin/$tool
    echo '[ "$1" = --version ] && echo systemd 257 && exit' >>/run/bin/$tool
    echo "echo $tool \\$* >>/run/calls" >>/run/bin/$tool
    chmod +x /run/bin/$tool
done
PATH=/run/bin:/usr/bin:$PATH sh "$3/install.sh" --no-bundle || exit
cat /run/calls
getent passwd qwedge
stat -c '%n %U %a' /etc/qwedge/credentials /var/lib/qwedge
"""
SCRIPTS = [FIRMWARE / "install.sh", FIRMWARE / "common/bin/qwedge", *sorted((ROOT / ".ci").glob("*.sh"))]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit for this architecture with a tiny model; the wheels come from the index or the cache."""
    if platform.machine() != "x86_64":
        pytest.skip("the kit of this test is for x86")
    folder = tmp_path_factory.mktemp("kits")
    bundle = export_two(folder / "bundles") / "first"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if shutil.which(f"python{version}") is None:
        missing(f"this test needs python{version} on PATH")
    done = attempt(ROOT / ".ci/offline-kit.sh", BOARD, bundle, folder / "kit", env={"PYTHON_VERSION": version})
    if done.returncode != 0:
        missing(f"the wheels cannot be had: {done.stdout.strip().splitlines()[-1]}")
    return folder / "kit"


@pytest.fixture(scope="module")
def device(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder with the kit installed."""
    root = tmp_path_factory.mktemp("device")
    said = install(kit, root).stdout
    assert "install: done" in said, said
    return root


def install(kit: Path, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # With the state as the home, what is left there by the model's trial would be seen.
    env = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "HOME": f"{root}/var/lib/qwedge"}
    return attempt("sh", kit / "install.sh", "--root", root, *options, env=env)


def files(root: Path) -> dict[str, int]:
    """Every path with when it was changed."""
    return {str(path.relative_to(root)): path.lstat().st_mtime_ns for path in sorted(root.rglob("*"))}


@pytest.fixture
def other_kit(kit: Path, tmp_path: Path) -> Path:
    """A copy of the kit that may be changed; its wheels are links."""
    shutil.copytree(kit, tmp_path / "kit", copy_function=os.link)
    return tmp_path / "kit"


def change(kit: Path, name: str, before: str, after: str, *, sealed: bool = True) -> None:
    """Change a file of a kit; ``sealed``: as a newer kit would have it, with its sum."""
    path = kit / name
    text = path.read_text()
    assert before in text
    path.unlink()
    path.write_text(text.replace(before, after))
    if sealed:
        sums = [line for line in (kit / "SHA256SUMS").read_text().splitlines() if not line.endswith(f"  ./{name}")]
        (kit / "SHA256SUMS").unlink()
        (kit / "SHA256SUMS").write_text("\n".join([*sums, run("sha256sum", f"./{name}", cwd=kit).strip()]) + "\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    assert run(need("shellcheck", "shellcheck"), script) == ""


def test_the_installed_service_starts_without_a_network_and_answers(device: Path) -> None:
    """ExecStart of the unit, below the device's root: READY=1, an answer, the watchdog fed, a clean end."""
    program, *arguments = directives(UNIT)["Service"]["ExecStart"].split()
    command = [f"{device}{program}", *(f"{device}{word}" if word.startswith("/etc") else word for word in arguments)]
    session = Path(__file__).with_name("service_session.py")
    home = device / "var/lib/qwedge"
    environment = {"STATE_DIRECTORY": str(home), "HOME": str(home), "PYTHONPATH": ""}
    name, value = directives(UNIT)["Service"]["Environment"].split("=", 1)
    environment[name] = value
    seen = json.loads(run(*namespace(), sys.executable, session, *command, env=environment))
    assert "READY=1" in seen["told"]
    assert "STOPPING=1" in seen["told"]
    assert not (home / ".cache").exists()  # where onnxruntime would keep what it knows of the device
    assert (seen["tokens"], seen["status"]) == (4, 0), seen["log"]
    if tuple(map(int, platform.release().split(".")[:2])) >= (6, 3):
        assert seen["no_executable_memory"]  # so MemoryDenyWriteExecute= holds


def test_on_a_machine_with_systemd_users_folders_and_services_are_set_up(
    kit: Path, device: Path, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root installs a service")
    done = attempt(*namespace(mounts=True), "sh", "-c", REAL_PATHS, "sh", tmp_path, device / "opt/qwedge", kit)
    if done.returncode == 99:
        missing("this test needs overlay file systems")
    if "lies in somebody's home" in done.stdout:  # a service that ProtectHome= keeps from its Python would not start
        pytest.skip("this machine has no Python outside of homes")
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("sys")] == [
        "systemctl daemon-reload",
        "sysctl --quiet --system",
        "systemctl try-restart systemd-journald.service",
        "systemctl enable --now qwedge-power.service",
        "systemctl enable qwedge.service",
        "systemctl restart qwedge.service",
    ], done.stdout
    assert "install: file /etc/systemd/system/qwedge.service.d/systemd-254.conf" in lines
    assert any(line.startswith("qwedge:") and line.endswith("/usr/sbin/nologin") for line in lines)
    assert "/etc/qwedge/credentials root 700" in lines
    assert "/var/lib/qwedge qwedge 700" in lines


def test_the_installed_program_is_the_projects_alone(device: Path) -> None:
    current = device / "opt/qwedge/current"
    assert "Usage: qwedge" in run(current / "bin/qwedge", "--help", env={"PYTHONPATH": ""})
    listed = json.loads(
        run(current / "bin/qwedge", "list", "--json", env={"STATE_DIRECTORY": f"{device}/var/lib/qwedge"})
    )
    assert "first" in json.dumps(listed)
    assert not list(current.glob("lib/*/site-packages/pip"))
    assert not list(current.glob("lib/*/site-packages/torch"))


def test_once_more_changes_nothing(kit: Path, device: Path) -> None:
    before = files(device)
    said = install(kit, device, "--no-bundle").stdout
    assert "is there" in said
    assert "file /" not in said
    changed = {name for name, time in files(device).items() if before.get(name) != time}
    assert not {name for name in changed if not name.startswith("opt/qwedge")}, changed


def test_a_rehearsal_changes_nothing(kit: Path, tmp_path: Path) -> None:
    said = install(kit, tmp_path, "--dry-run")
    assert said.returncode == 0
    assert "would run" in said.stdout
    assert "file /etc/qwedge/edge.toml" in said.stdout
    assert files(tmp_path) == {}


def test_what_somebody_has_changed_is_kept_and_what_nobody_has_is_renewed(other_kit: Path, device: Path) -> None:
    settings, unit = device / "etc/qwedge/edge.toml", device / "etc/systemd/system/qwedge.service"
    mine = settings.read_text() + "\n[log]\nlevel = 'debug'\n"
    settings.write_text(mine)
    change(other_kit, "board/edge.toml", "threads = 4", "threads = 3")
    change(other_kit, "common/systemd/qwedge.service", "WatchdogSec=3min", "WatchdogSec=4min")
    said = install(other_kit, device, "--no-bundle").stdout
    assert "kept /etc/qwedge/edge.toml" in said
    assert settings.read_text() == mine
    assert "threads = 3" in settings.with_name("edge.toml.new").read_text()
    assert "WatchdogSec=4min" in unit.read_text()
    # Taken over by hand: the new one is no longer beside it.
    settings.write_text(settings.with_name("edge.toml.new").read_text())
    install(other_kit, device, "--no-bundle")
    assert not settings.with_name("edge.toml.new").exists()


@pytest.mark.parametrize(
    ("name", "before", "after", "sealed", "error"),
    [
        ("board/edge.toml", "threads", "thread", False, "the kit is damaged: ./board/edge.toml: FAILED"),
        ("kit.env", "ARCH=x86_64", "ARCH=aarch64", True, "this kit is for aarch64"),
        ("kit.env", "GLIBC_MINOR=", "GLIBC_MINOR=9", True, "this system's glibc is older than 2.9"),
        ("kit.env", "PYTHON_VERSION=3", "PYTHON_VERSION=4", True, "there is no python4"),
        ("install.sh", "* 4 + 65536", "* 4 + 99999999999", True, "97656"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_changed(
    other_kit: Path, tmp_path: Path, name: str, before: str, after: str, *, sealed: bool, error: str
) -> None:
    change(other_kit, name, before, after, sealed=sealed)
    (tmp_path / "root").mkdir()
    refused = install(other_kit, tmp_path / "root")
    assert refused.returncode == 2
    assert f"error: {error}" in refused.stdout
    assert "hint: " in refused.stdout
    assert files(tmp_path / "root") == {}


def test_a_kit_whose_wheels_are_others_installs_nothing(other_kit: Path, tmp_path: Path) -> None:
    """The lock's hashes count, not only the kit's own sums."""
    wheel = next((other_kit / "wheels").glob("h11-*.whl"))
    forged = wheel.read_bytes() + b"\0"
    wheel.unlink()
    wheel.write_bytes(forged)
    change(other_kit, "kit.env", "BOARD", "BOARD")
    name = f"wheels/{wheel.name}"
    sums = [line for line in (other_kit / "SHA256SUMS").read_text().splitlines() if name not in line]
    (other_kit / "SHA256SUMS").write_text(
        "\n".join([*sums, run("sha256sum", f"./{name}", cwd=other_kit).strip()]) + "\n"
    )
    (tmp_path / "root").mkdir()
    refused = install(other_kit, tmp_path / "root")
    assert refused.returncode != 0
    assert "DO NOT MATCH" in refused.stdout
    assert not (tmp_path / "root/opt/qwedge/current").exists()


def test_wrong_options_are_refused(kit: Path, tmp_path: Path) -> None:
    for options, error in ((["--rot"], "--rot is no option"), (["--root"], "--root names no folder")):
        refused = attempt("sh", kit / "install.sh", *options)
        assert (refused.returncode, error in refused.stdout) == (2, True)
    assert "--dry-run" in run("sh", kit / "install.sh", "--help")
    shutil.copy(kit / "install.sh", tmp_path)
    assert "is no kit" in attempt("sh", tmp_path / "install.sh", "--root", tmp_path).stdout


def test_a_kit_is_refused_for_what_is_not_there(tmp_path: Path) -> None:
    script = ROOT / ".ci/offline-kit.sh"
    refused = attempt(script, "raspberry-pi-9", "-", tmp_path / "kit")
    assert (refused.returncode, "there is no board 'raspberry-pi-9'" in refused.stdout) == (2, True)
    assert "raspberry-pi-5" in refused.stdout
    assert "is no bundle" in attempt(script, BOARD, tmp_path, tmp_path / "kit").stdout
