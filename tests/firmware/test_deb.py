"""The Debian package: built twice, judged by lintian, installed, served from, removed and purged by the real dpkg.

The packages of these tests have two of the wheels, one of them compiled; ``python -m tests.firmware.packages`` builds
and judges those with all of them.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from edge.config import load_settings
from tests.edge.managed import export_two
from tests.firmware.tools import BOARDS, FIRMWARE, ROOT, attempt, missing, namespace, need, run

DEBIAN = FIRMWARE / "debian"
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
ELF_MACHINES = {"amd64": 62, "arm64": 183}
"""``e_machine`` of an ELF file, the two bytes at 18."""
WHEELS = ("h11", "psutil")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SCRIPTS = sorted(DEBIAN / name for name in ("postinst", "prerm", "postrm", "qwedge-board"))


@dataclass(frozen=True, slots=True)
class Package:
    """A built package, and its files unpacked."""

    file: Path
    root: Path

    def read(self, name: str) -> str:
        return (self.root / name).read_text()

    def field(self, name: str) -> str:
        return run("dpkg-deb", "--field", self.file, name).strip()


def collect(arch: str, folder: Path) -> Path:
    """A few wheels with the hashes of the lock."""
    stanzas = re.split(r"^(?=[a-z])", (ROOT / ".locks/runtime.txt").read_text(), flags=re.MULTILINE)
    lock = folder / f"{arch}.txt"
    lock.write_text("".join(stanza for stanza in stanzas if stanza.startswith(tuple(f"{name}==" for name in WHEELS))))
    done = attempt(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "download", "--no-deps"),
        *("--require-hashes", "--only-binary", ":all:", "--platform", f"manylinux_2_28_{MACHINES[arch]}"),
        *("--python-version", PYTHON, "--implementation", "cp", "--abi", "abi3", "--abi", "none"),
        *("-r", lock, "-d", folder / arch),
    )
    if done.returncode != 0:
        missing(f"the wheels cannot be had: {done.stdout.strip().splitlines()[-1]}")
    return folder / arch


def build(arch: str, wheels: Path, folder: Path, **env: str) -> Package:
    environment = {"WHEELS": str(wheels), "PYTHON_VERSION": PYTHON, "SOURCE_DATE_EPOCH": "1767225600"} | env
    assert run(ROOT / ".ci/make-deb.sh", arch, folder, env=environment).startswith("deb: ")
    (file,) = folder.glob("*.deb")
    run("dpkg-deb", "--raw-extract", file, folder / "root")
    return Package(file, folder / "root")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("dpkg-deb", "dpkg")
    folder = tmp_path_factory.mktemp("wheels")
    for arch in MACHINES:
        collect(arch, folder)
    return folder


@pytest.fixture(scope="module")
def packages(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    return {arch: build(arch, wheels / arch, tmp_path_factory.mktemp(arch)) for arch in MACHINES}


def test_lintian_has_nothing_to_say(packages: dict[str, Package]) -> None:
    """Errors and warnings fail; what is overridden has its reason in the file lintian-overrides."""
    judged = attempt(need("lintian", "lintian"), "--allow-root", "--fail-on", "error,warning", packages["arm64"].file)
    assert (judged.returncode, judged.stdout) == (0, "")


@pytest.mark.parametrize("arch", MACHINES)
def test_what_is_compiled_is_for_the_architecture(packages: dict[str, Package], arch: str) -> None:
    libraries = [path for path in packages[arch].root.rglob("*.so*") if path.is_file()]
    assert libraries
    for path in libraries:
        assert int.from_bytes(path.read_bytes()[18:20], "little") == ELF_MACHINES[arch], path
    assert packages[arch].field("Architecture") == arch
    template, control = (DEBIAN / "control").read_text(), packages[arch].read("DEBIAN/control")
    assert "@" in template
    assert not re.search(r"@[A-Z_]+@", control)
    assert f"python{PYTHON}, libc6 (>= 2.28)" in packages[arch].field("Depends")  # psutil's manylinux_2_28


def test_files_lie_where_debian_wants_them(packages: dict[str, Package]) -> None:
    root = packages["amd64"].root
    for name in (
        "lib/systemd/system/qwedge.service",
        "lib/systemd/journald.conf.d/qwedge.conf",
        "lib/systemd/zram-generator.conf.d/qwedge.conf",
        "lib/sysusers.d/qwedge.conf",
        "lib/tmpfiles.d/qwedge.conf",
        "lib/sysctl.d/80-qwedge.conf",
        "share/doc/qwedge/examples/nftables.conf",
        "share/man/man8/qwedge-board.8.gz",
    ):
        assert (root / "usr" / name).is_file(), name
    assert tuple(sorted(path.name for path in (root / "usr/share/qwedge/boards").iterdir())) == BOARDS
    assert packages["amd64"].read("DEBIAN/conffiles") == "/etc/qwedge/edge.toml\n"
    unit = packages["amd64"].read("usr/lib/systemd/system/qwedge.service")
    assert "ExecStart=/usr/lib/qwedge/bin/qwedge serve" in unit
    for path in (root / "usr").rglob("*"):  # the kit's folder is not the package's
        if path.suffix in {".service", ".conf", ".toml"} or path.parent.name == "bin":
            assert path.is_symlink() or "/opt/qwedge" not in path.read_text(), path


def test_the_settings_are_the_runtimes_and_each_has_a_reason() -> None:
    assert load_settings(DEBIAN / "default.toml").mqtt.broker == "mqtt://127.0.0.1:1883"
    lines = (DEBIAN / "default.toml").read_text().splitlines()
    for before, line in pairwise(lines):
        assert " = " not in line or line.startswith("#") or before.startswith("# "), line


def test_licences_of_the_wheels_are_named(packages: dict[str, Package]) -> None:
    page = packages["arm64"].read("usr/share/doc/qwedge/copyright")
    stanzas = {match[1]: match[0] for match in re.finditer(r"Files: .*?Comment: (\S+)[^\n]+", page, re.DOTALL)}
    assert set(stanzas) == set(WHEELS)
    assert "License: MIT\n" in stanzas["h11"]
    assert "Permission is hereby granted" in stanzas["h11"]
    assert "License: BSD-3-Clause\n" in stanzas["psutil"]
    assert "Giampaolo Rodola" in stanzas["psutil"]
    assert f"usr/lib/qwedge/lib/python{PYTHON}/site-packages/psutil/*" in stanzas["psutil"]


def test_the_manual_has_every_command_and_the_changelog_every_line(packages: dict[str, Package]) -> None:
    need("man", "man-db")
    share = packages["amd64"].root / "usr/share"
    rendered = run("man", "-l", "-Tascii", "-P", "cat", "--warnings", share / "man/man1/qwedge.1.gz")
    rendered = re.sub(".\b", "", rendered)  # bold is a letter twice
    commands = re.findall(r"^## (.+)$", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    for command in commands:
        assert re.search(rf"^ +qwedge {command}( |$)", rendered, re.MULTILINE), command
    assert "--require SUITE:SCORE" in rendered
    changes = gzip.decompress((share / "doc/qwedge/changelog.gz").read_bytes()).decode()
    assert changes.startswith(f"qwedge ({packages['amd64'].field('Version')}) ")
    items = re.findall(r"^- ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes.count("\n  * ") == len(items)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    assert run(need("shellcheck", "shellcheck"), script) == ""


def test_from_installation_to_purge(packages: dict[str, Package], tmp_path: Path) -> None:
    if os.geteuid() != 0 or platform.machine() != "x86_64":
        pytest.skip("root on x86 installs this package")
    if attempt(f"/usr/bin/python{PYTHON}", "--version").returncode != 0:
        missing(f"this test needs Debian's python{PYTHON}: apt-get install python{PYTHON}")
    bundle = export_two(tmp_path / "bundles") / "first"
    (tmp_path / "scratch").mkdir()
    done = attempt(
        *(*namespace(mounts=True), f"/usr/bin/python{PYTHON}", str(Path(__file__).with_name("deb_session.py"))),
        *(str(packages["amd64"].file), str(bundle), sysconfig.get_path("platlib"), str(tmp_path / "scratch")),
    )
    if done.returncode == 99:
        missing("this test needs overlay file systems")
    assert done.returncode == 0, done.stdout
    seen = json.loads(done.stdout)
    assert (seen["enabled"], seen["compiled"], seen["verify"]) == (True, True, ""), seen
    assert seen["calls"] == []  # enabled, but not started without a model
    assert "qwedge: next: " in seen["installed"]
    assert "none is active" in seen["no_model"]
    assert seen["modes"] == [
        "/etc/qwedge/credentials root 700",
        "/var/lib/qwedge qwedge 700",
        "/var/log/qwedge qwedge 700",
    ]
    assert seen["version"].startswith("qwedge ")
    assert "FAIL" not in seen["doctor"]
    assert "active: " in seen["activated"]
    assert seen["service"] == {"tokens": 4, "status": 0}
    chosen = seen["boards"]
    assert [line.split(":")[0].strip() for line in chosen["listed"].splitlines()][: len(BOARDS)] == list(BOARDS)
    assert chosen["taken"] == (FIRMWARE / "x86-n100/edge.toml").read_text()
    assert chosen["limits"] == "/usr/share/qwedge/boards/x86-n100/board.conf"
    assert chosen["mine"]
    assert chosen["beside"] == (FIRMWARE / "raspberry-pi-5/edge.toml").read_text()
    assert "there is no board 'raspberry-pi-9'" in chosen["refused"]
    assert "try-restart qwedge.service" in chosen["calls"]
    assert seen["again"]["mine"]
    assert seen["again"]["calls"] == ["stop qwedge.service", "--quiet --system restart qwedge.service"]
    assert "/etc/qwedge/edge.toml" in seen["removed"]["left"]
    assert not [path for path in seen["removed"]["left"] if path.startswith("/usr/")]
    assert "the models stay" in seen["purged"]["said"]
    assert {path for path in seen["purged"]["left"] if not path.startswith("/var/lib/qwedge")} == set()
    assert seen["purged"]["gone"] == []
