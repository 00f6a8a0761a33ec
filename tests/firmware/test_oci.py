"""The container image: its layout read by skopeo and unpacked by umoci, the recipe for builders that have a registry.

The layers of these tests are small; ``python -m tests.firmware.image`` builds the real ones and serves from them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from edge.config import load_settings
from tests.firmware.test_k3s import USER, judge
from tests.firmware.tools import FIRMWARE, ROOT, attempt, namespace, need, run

OCI = FIRMWARE / "oci"
ARCHITECTURES = ("amd64", "arm64")
EPOCH = "1767225600"


def lay_out(folder: Path) -> Path:
    """A layout of two images whose layers have one file each."""
    images = []
    for arch in ARCHITECTURES:
        for part in ("base", "qwedge"):
            content = folder / f"{arch}-{part}"
            content.mkdir()
            (content / part).write_text(arch)
            layer = folder / f"{content.name}.tar.gz"
            packing = ("tar", "--owner=0", "--group=0", "--mtime", f"@{EPOCH}", "-C", content, "-czf", layer, ".")
            run(*packing, env={"GZIP": "-n"})
        images.append(f"{arch}:{folder}/{arch}-base.tar.gz:{folder}/{arch}-qwedge.tar.gz")
    run(
        sys.executable,
        ROOT / ".ci/oci_layout.py",
        folder / "layout",
        "1.2.3",
        *images,
        env={"SOURCE_DATE_EPOCH": EPOCH},
    )
    return folder / "layout"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("oci"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_skopeo_finds_an_image_for_each_architecture(layout: Path, arch: str) -> None:
    skopeo = need("skopeo", "skopeo")
    image = f"oci:{layout}:1.2.3"
    seen = json.loads(run(skopeo, f"--override-arch={arch}", "inspect", "--config", image))
    assert (seen["architecture"], seen["os"], seen["created"]) == (arch, "linux", "2026-01-01T00:00:00Z")
    config = seen["config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["/usr/bin/qwedge"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Volumes"] == {"/var/lib/qwedge": {}}
    assert config["Labels"]["org.opencontainers.image.version"] == "1.2.3"
    assert "ORT_DISABLE_TELEMETRY=1" in config["Env"]


def test_skopeo_copies_all_of_it_and_every_digest_holds(layout: Path, tmp_path: Path) -> None:
    """A copy verifies each blob; a changed one is refused."""
    skopeo = need("skopeo", "skopeo")
    copy = ("--insecure-policy", "copy", "--all")
    run(skopeo, *copy, f"oci:{layout}:1.2.3", f"oci-archive:{tmp_path}/copy.tar")
    damaged = shutil.copytree(layout, tmp_path / "damaged")
    largest = max((damaged / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    assert attempt(skopeo, *copy, f"oci:{damaged}:1.2.3", f"oci-archive:{tmp_path}/other.tar").returncode != 0


def test_umoci_unpacks_both_layers(layout: Path, tmp_path: Path) -> None:
    """Of one architecture, which umoci does not choose by itself."""
    one = f"oci:{tmp_path}/one:1.2.3"
    run(need("skopeo", "skopeo"), "--insecure-policy", "--override-arch=arm64", "copy", f"oci:{layout}:1.2.3", one)
    rootless = [] if os.geteuid() == 0 else ["--rootless"]
    run(need("umoci", "umoci"), "unpack", *rootless, "--image", f"{tmp_path}/one:1.2.3", tmp_path / "bundle")
    assert {path.read_text() for path in (tmp_path / "bundle/rootfs").iterdir() if path.is_file()} == {"arm64"}
    process = json.loads((tmp_path / "bundle/config.json").read_text())["process"]
    assert (process["user"]["uid"], process["args"][:2]) == (USER, ["/usr/bin/qwedge", "serve"])


def test_the_same_layers_make_the_same_image(layout: Path, tmp_path: Path) -> None:
    again = lay_out(tmp_path)
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(layout) for path in layout.rglob("*") if path.is_file())
    for name in files:  # those below blobs/ are named by their content
        assert (again / name).read_bytes() == (layout / name).read_bytes()


def test_the_recipe_is_clean_and_makes_the_same_as_the_layout() -> None:
    recipe = (OCI / "Containerfile").read_text()
    assert run(judge("hadolint"), OCI / "Containerfile") == ""
    script = (ROOT / ".ci/oci_layout.py").read_text()
    for shared in (
        f"{USER}:{USER}",
        "/health/live', timeout=4",
        '["/usr/bin/qwedge"]',
        "SIGTERM",
        "ORT_DISABLE_TELEMETRY=1",
    ):
        assert shared in recipe
        assert shared in script


def test_without_keys_a_container_serves_nobody() -> None:
    """The image listens to the network, so it starts with keys alone, unless it is opened on purpose."""
    server = load_settings(OCI / "container.toml").server
    assert (server.host, server.open) == ("0.0.0.0", "off")


def test_glibc_finds_users_groups_and_hosts() -> None:
    """The image's passwd, group and nsswitch.conf instead of this machine's."""
    mounts = " && ".join(f"mount --bind '{OCI}/{name}' /etc/{name}" for name in ("passwd", "group", "nsswitch.conf"))
    script = f"{mounts} && getent passwd {USER} && getent group qwedge && getent hosts localhost"
    passwd, group, hosts = run(*namespace(mounts=True), "sh", "-c", script).splitlines()[:3]
    assert passwd.startswith(f"qwedge:x:{USER}:{USER}:")
    assert passwd.endswith(":/var/lib/qwedge:/usr/sbin/nologin")
    assert group == f"qwedge:x:{USER}:"
    assert "localhost" in hosts


def test_what_is_taken_of_debian_has_no_shell_and_no_package_manager() -> None:
    patterns = (OCI / "files").read_text().split()
    assert "./usr/bin/python3*" in patterns
    assert not [pattern for pattern in patterns if pattern.startswith(("./bin", "./sbin", "./usr/sbin", "./usr/bin/*"))]


def test_an_architecture_is_needed() -> None:
    refused = attempt(ROOT / ".ci/make-oci.sh", "dist")
    assert (refused.returncode, "an architecture" in refused.stdout) == (2, True)
