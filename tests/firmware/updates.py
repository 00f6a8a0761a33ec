"""What updates are made of, in small: a kit, a bundle, certificates; and a device that they are installed on."""

from __future__ import annotations

import json
import os
import platform
import signal
import site
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import sign_bundle
from edge.signing import PrivateKey, make_keys
from tests.edge.managed import NAMES, export_two
from tests.firmware.tools import FIRMWARE, attempt, missing, namespace, need, run

BOARD = "raspberry-pi-5"
VERSION = "7.8.9"
PROGRAM = {
    "edge/cli.py": f"def main() -> None:\n    print('qwedge {VERSION}')\n",
    "edge/loader.py": "",
    "edge/__init__.py": "",
}
PYTHON_OF_TESTS = Path(sys.executable)
PYTHON_OF_DEVICE = PYTHON_OF_TESTS.resolve()
PACKAGES = site.getsitepackages()[0]
# What runs as the user qwedge here is root by another name: nobody else may read this checkout.
DEVICE = """
mount -t tmpfs none "$1" && mount -t tmpfs none /run
for name in etc opt var usr/lib usr/local; do
    mkdir -p "$1/$name/upper" "$1/$name/work"
    mount -t overlay none -o "lowerdir=/$name,upperdir=$1/$name/upper,workdir=$1/$name/work" "/$name" || exit 99
done
grep -v ^qwedge: /etc/passwd >"$1/passwd" && cp "$1/passwd" /etc/passwd
echo "qwedge:x:0:0::/var/lib/qwedge:/bin/sh" >>/etc/passwd
mkdir -p /usr/lib/qwedge /var/lib/qwedge /opt/qwedge /etc/qwedge "$1/images"
cp "$2/update/qwedge-slots" /usr/lib/qwedge/qwedge-slots
printf '#!/bin/sh\\nSTATE_DIRECTORY=/var/lib/qwedge exec %s -m edge.cli "$@"\\n' "$3" >/usr/local/bin/qwedge
chmod +x /usr/local/bin/qwedge
printf '[model]\\ntrust = "/etc/qwedge/trusted"\\n' >/etc/qwedge/edge.toml
mkdir /etc/qwedge/trusted
for slot in A B; do
    truncate -s 2M "$1/images/$slot.img"
    echo "DEVICE_$slot=$1/images/$slot.img" >>/etc/qwedge/slots.env
done
echo ready
exec sleep 600
"""


@dataclass(frozen=True)
class Device:
    """A machine of its own as far as files and mounts go."""

    pid: int
    """Of a process that holds its namespaces."""
    folder: Path
    """A file system in memory that only this machine sees."""

    def attempt(self, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run something that may fail."""
        return attempt(*self.enter, *command, env={"PYTHONPATH": PACKAGES, **env})

    def run(self, *command: str | Path, **env: str) -> str:
        """Run something that must succeed; returns what it says."""
        done = self.attempt(*command, **env)
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def slots(self, *command: str, **env: str) -> str:
        """Run ``qwedge-slots``."""
        return self.run("/usr/lib/qwedge/qwedge-slots", *command, **env).strip()

    def bundles(self) -> list[dict[str, Any]]:
        """What is in the model store."""
        listed: list[dict[str, Any]] = json.loads(
            self.run("/usr/local/bin/qwedge", "list", "--json", "--trust", "/etc/qwedge/trusted")
        )
        return listed

    @property
    def enter(self) -> tuple[str, ...]:
        """What runs a command on it."""
        return (need("nsenter", "util-linux"), f"--target={self.pid}", "--mount", "--net")


@contextmanager
def new_device(folder: Path) -> Iterator[Device]:
    """A device until the block ends; the test is skipped where none can be made."""
    if os.geteuid() != 0 or attempt("mount", "--version").returncode != 0:
        pytest.skip("only root can make a device of its own")
    folder.mkdir()
    command = [*namespace(mounts=True), "sh", "-eu", "-c", DEVICE, "sh", folder, FIRMWARE, PYTHON_OF_TESTS]
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as machine:
        try:
            assert machine.stdout is not None
            if machine.stdout.readline() != "ready\n":
                missing("this test needs overlay file systems")
            device = Device(machine.pid, folder)
            device.run("mksquashfs", "/etc/qwedge", folder / "try.img", "-quiet", "-no-progress")
            if device.attempt("mount", "-t", "squashfs", folder / "try.img", "/mnt").returncode != 0:
                pytest.skip("this kernel mounts no images: loop devices and squashfs are needed")
            device.run("umount", "/mnt")
            yield device
        finally:
            machine.send_signal(signal.SIGTERM)


def write_kit(folder: Path) -> Path:
    """A kit for this architecture whose program says its version; what it needs besides is this environment's."""
    (folder / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(folder / "wheels" / f"qwedge-{VERSION}-py3-none-any.whl", "w") as wheel:
        for name, text in PROGRAM.items():
            wheel.writestr(zipfile.ZipInfo(name), text)
    values = {
        "BOARD": BOARD,
        "ARCH": platform.machine(),
        "PYTHON_VERSION": f"{sys.version_info.major}.{sys.version_info.minor}",
        "GLIBC_MINOR": "17",
        "QWEDGE_VERSION": VERSION,
    }
    seal(folder, values)
    return folder


def seal(kit: Path, values: dict[str, str]) -> None:
    """Write what a kit says of itself."""
    (kit / "kit.env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    names = ["./kit.env", *(f"./wheels/{path.name}" for path in (kit / "wheels").iterdir())]
    (kit / "SHA256SUMS").write_text(run("sha256sum", *names, cwd=kit))


def write_authority(folder: Path) -> Path:
    """An authority (``ca.pem``) with two certificates: ``signer`` may sign code, ``server`` may not."""
    folder.mkdir()
    openssl = need("openssl", "openssl")
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30")
    run(openssl, *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", cwd=folder)
    for name, usage in (("signer", "codeSigning,emailProtection"), ("server", "serverAuth")):
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", f"extendedKeyUsage=critical,{usage}")
        names = ("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
        run(openssl, *new, *signed, *names, "-addext", "basicConstraints=critical,CA:FALSE", cwd=folder)
    return folder


def write_bundles(folder: Path) -> Path:
    """Bundles ``first`` and ``second``, which ``keys/plant.pub`` has signed, in a folder."""
    export_two(folder)
    make_keys(folder / "keys", "plant")
    for name in NAMES:
        sign_bundle(folder / name, PrivateKey.load(folder / "keys" / "plant.key"))
    return folder
