"""The container image for both architectures, and a model served from it: ``python -m tests.firmware.image``, as root.

Builds it, reads it with skopeo, looks at what is in it, and has runc run this machine's: another user than root, a root
file system that is read-only, no capabilities, a network of its own. Takes minutes, and needs mmdebstrap, skopeo, umoci
and runc.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.edge.managed import export_two
from tests.firmware.test_deb import ELF_MACHINES
from tests.firmware.test_k3s import USER
from tests.firmware.tools import ROOT, attempt, run

HOST: Final = run("dpkg", "--print-architecture").strip()
NAME: Final = "qwedge-test"
PYTHON: Final = "/usr/lib/qwedge/bin/python3"
ASK: Final = """
import urllib.request as r
body = b'{"prompt": "Hi", "max_tokens": 4, "ignore_eos": true}'
print(r.urlopen(r.Request("http://127.0.0.1:8080/v1/completions", body), timeout=60).read().decode())
"""
PROBE: Final = "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health/live', timeout=4)"
"""As in .ci/oci_layout.py and in the Containerfile."""
SHELLS: Final = ("sh", "bash", "dash", "dpkg", "apt", "perl", "tar", "su")


def main() -> None:
    """Report on the image; raises AssertionError for what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        said = run(ROOT / ".ci/make-oci.sh", folder, *ELF_MACHINES)
        (archive,) = folder.glob("*.oci.tar")
        for arch in ELF_MACHINES:
            root = unpack(archive, arch, folder / arch)
            look(root, arch)
            files = run("du", "-sm", root).split()[0]
            print(f"{arch}: {files} MiB unpacked")
        print(said.strip())
        bundle = export_two(folder / "bundles") / "first"
        prepare(folder / HOST / "bundle/config.json", bundle, folder / "state")
        print(serve(folder / HOST / "bundle"))


def unpack(archive: Path, arch: str, folder: Path) -> Path:
    """The root file system of one architecture."""
    folder.mkdir()
    run(
        "skopeo",
        "--insecure-policy",
        f"--override-arch={arch}",
        "copy",
        f"oci-archive:{archive}",
        f"oci:{folder}/one:it",
    )
    run("umoci", "unpack", "--image", f"{folder}/one:it", folder / "bundle")
    return folder / "bundle/rootfs"


def look(root: Path, arch: str) -> None:
    """What must be in it, and what must not."""
    libraries = [path for path in root.rglob("*.so*") if path.is_file() and path.read_bytes()[:4] == b"\x7fELF"]
    assert len(libraries) > 100
    for path in libraries:
        assert int.from_bytes(path.read_bytes()[18:20], "little") == ELF_MACHINES[arch], path
    assert not [path for path in root.rglob("*") if path.name in SHELLS and path.is_file()]
    assert (root / "etc/ssl/certs/ca-certificates.crt").stat().st_size > 100_000
    assert list(root.glob("usr/lib/qwedge/lib/python3*/site-packages/edge/__pycache__/*.pyc"))
    owners = {path.lstat().st_uid for path in root.rglob("*") if path != root / "var/lib/qwedge"}
    assert owners == {0}
    assert (root / "var/lib/qwedge").stat().st_uid == USER


def prepare(config: Path, bundle: Path, state: Path) -> None:
    """A pod as firmware-configs/k3s has it, without a terminal and without limits, which not all machines can set."""
    state.mkdir()
    os.chown(state, USER, USER)
    spec: dict[str, Any] = json.loads(config.read_text())
    spec["process"] |= {"terminal": False, "noNewPrivileges": True, "capabilities": {}}
    spec["process"]["args"] += ["--bundle", "/models"]
    spec["process"]["env"] += ["QWEDGE_SERVER_OPEN=on"]
    spec["root"]["readonly"] = True
    spec["linux"].pop("resources", None)
    kept = [mount for mount in spec["mounts"] if mount["destination"] not in {"/sys/fs/cgroup", "/var/lib/qwedge"}]
    spec["mounts"] = [
        *kept,
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/var/lib/qwedge", "type": "bind", "source": str(state), "options": ["rbind", "rw"]},
        {"destination": "/models", "type": "bind", "source": str(bundle), "options": ["rbind", "ro"]},
    ]
    config.write_text(json.dumps(spec))


def serve(bundle: Path) -> str:
    """Start the container, probe and ask it from inside, end it; returns the answer."""
    with container(bundle):
        until = time.monotonic() + 120
        while attempt("runc", "exec", NAME, PYTHON, "-c", PROBE).returncode != 0:
            assert time.monotonic() < until, "the container does not get ready"
            time.sleep(0.5)
        assert run("runc", "exec", NAME, "/usr/bin/qwedge", "--version").startswith("qwedge ")
        refused = attempt("runc", "exec", NAME, PYTHON, "-c", "open('/etc/new', 'w')").stdout
        assert "Read-only file system" in refused, refused
        return run("runc", "exec", NAME, PYTHON, "-c", ASK)


@contextmanager
def container(bundle: Path) -> Iterator[None]:
    """A running container; its end by SIGTERM must be a clean one."""
    with subprocess.Popen(["runc", "run", NAME], cwd=bundle) as process:
        try:
            yield
        finally:
            attempt("runc", "kill", NAME, "TERM")
            status = process.wait(60)
    assert status == 0


if __name__ == "__main__":
    main()
