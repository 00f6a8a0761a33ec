"""The unit, its drop-ins and the files beside it, checked by systemd's own tools."""

from __future__ import annotations

import configparser
import itertools
import os
import re
import shutil
from pathlib import Path

import pytest

from edge.config import load_settings
from edge.settings.server import ServerSettings
from tests.firmware.tools import COMMON, FIRMWARE, attempt, namespace, need, run

UNIT = COMMON / "systemd" / "qwedge.service"
DROP_INS = sorted((COMMON / "systemd" / "qwedge.service.d").iterdir())
MAX_EXPOSURE = 2.0
SINCE_254 = COMMON / "systemd" / "qwedge.service.d" / "systemd-254.conf"
FOR_DEBIAN_12 = [path for path in DROP_INS if path != SINCE_254]
COMBINATIONS = [
    mixed for size in range(len(FOR_DEBIAN_12) + 1) for mixed in itertools.combinations(FOR_DEBIAN_12, size)
]


def install(folder: Path, drop_ins: tuple[Path, ...]) -> Path:
    """The unit as on a device; its program is one that is here, since systemd looks."""
    unit = folder / UNIT.name
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    (folder / f"{UNIT.name}.d").mkdir()
    for path in drop_ins:
        shutil.copy(path, folder / f"{UNIT.name}.d")
    return unit


def systemd_version() -> int:
    found = re.match(r"systemd (\d+)", run(need("systemd-analyze", "systemd"), "--version"))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("drop_ins", COMBINATIONS, ids=lambda paths: "+".join(path.stem for path in paths) or "plain")
def test_the_unit_is_understood_and_sandboxed(tmp_path: Path, drop_ins: tuple[Path, ...]) -> None:
    analyze = need("systemd-analyze", "systemd")
    unit = install(tmp_path, drop_ins)
    assert run(analyze, "verify", unit, cwd=tmp_path) == ""  # an unknown key is a warning, and status 0
    threshold = f"--threshold={round(MAX_EXPOSURE * 10)}"
    judged = run(analyze, "security", "--offline=true", threshold, "--no-pager", unit, cwd=tmp_path)
    exposure = re.search(r"Overall exposure level for qwedge.service: ([0-9.]+)", judged)
    assert exposure is not None
    assert float(exposure[1]) <= MAX_EXPOSURE


def test_what_newer_systemds_do_better_is_a_drop_in_of_its_own(tmp_path: Path) -> None:
    unit = install(tmp_path, (SINCE_254,))
    said = run(need("systemd-analyze", "systemd"), "verify", unit, cwd=tmp_path)
    if systemd_version() >= 254:
        assert said == ""
    else:  # it says what it does not know; all of it is only in this drop-in, and nothing else is wrong
        unknown = set(re.findall(r"notify-reload|Restart\w+", said))
        assert unknown == {"notify-reload", "RestartSteps", "RestartMaxDelaySec"}
        assert len(said.splitlines()) == len(unknown)


def test_what_a_drop_in_sets_is_a_setting_and_its_files_are_credentials() -> None:
    """lan.conf opens the server with TLS; a certificate that systemd does not hand over would be looked for in vain."""
    text = (COMMON / "systemd" / "qwedge.service.d" / "lan.conf").read_text()
    env = dict(re.findall(r"^Environment=(\w+)=(.*)$", text, re.MULTILINE))
    server = load_settings(env={name: value.replace("%H", "edge-7") for name, value in env.items()}).server
    assert server.host == "0.0.0.0"
    assert server.allowed_hosts == ("edge-7.local", "edge-7")
    handed_over = re.findall(r"^LoadCredential=([^:]+):/etc/qwedge/credentials/\1$", text, re.MULTILINE)
    assert [str(server.tls_cert), str(server.tls_key)] == handed_over


def test_an_unknown_key_would_be_found(tmp_path: Path) -> None:
    unit = install(tmp_path, ())
    unit.write_text(unit.read_text().replace("ProtectHome=", "ProtectHomes="))
    assert "ProtectHomes" in attempt(need("systemd-analyze", "systemd"), "verify", unit, cwd=tmp_path).stdout


def test_a_running_request_is_not_cut_off_by_systemd() -> None:
    service = directives(UNIT)["Service"]
    stop_s = int(service["TimeoutStopSec"].removesuffix("s"))
    assert stop_s >= ServerSettings.model_fields["drain_s"].default + 30
    assert service["KillMode"] == "mixed"  # else the embedded broker gets SIGTERM before the last answer


def test_neither_network_nor_clock_is_waited_for() -> None:
    unit = directives(UNIT)["Unit"]
    assert not {"After", "Wants", "Requires"} & set(unit)


def test_the_user_can_be_made() -> None:
    said = run(need("systemd-sysusers", "systemd"), "--dry-run", COMMON / "sysusers.d/qwedge.conf")
    assert "qwedge" in Path("/etc/passwd").read_text() or "Creating user 'qwedge'" in said


def test_folders_are_made_with_their_owners(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    user, group = os.geteuid(), os.getegid()
    (tmp_path / "etc/passwd").write_text(f"root:x:0:0:::\nqwedge:x:{user or 998}:{group or 998}::/:/bin/false\n")
    (tmp_path / "etc/group").write_text(f"root:x:0:\nqwedge:x:{group or 998}:\n")
    tmpfiles = need("systemd-tmpfiles", "systemd")
    if os.geteuid() != 0:
        pytest.skip("only root gives folders to others")
    run(tmpfiles, f"--root={tmp_path}", "--create", COMMON / "tmpfiles.d/qwedge.conf")
    made = {
        name: ((tmp_path / name).stat().st_uid, oct((tmp_path / name).stat().st_mode & 0o777))
        for name in ("etc/qwedge", "etc/qwedge/credentials", "etc/qwedge/trusted", "var/lib/qwedge", "var/log/qwedge")
    }
    assert made == {
        "etc/qwedge": (0, "0o755"),
        "etc/qwedge/credentials": (0, "0o700"),
        "etc/qwedge/trusted": (0, "0o755"),
        "var/lib/qwedge": (998, "0o700"),
        "var/log/qwedge": (998, "0o700"),
    }


def test_the_journals_limits_are_understood(tmp_path: Path) -> None:
    """A journald of its own, whose sockets and settings lie in a namespace, says what it does not understand."""
    journald = need("systemd-journald", "systemd")
    sound = COMMON / "journald.conf.d/qwedge.conf"
    broken = tmp_path / "broken.conf"
    broken.write_text(sound.read_text().replace("SystemMaxUse", "SystemMaxUses"))
    assert "SystemMaxUses" in journald_says(journald, broken)
    assert journald_says(journald, sound) == ""


def journald_says(journald: str, settings: Path) -> str:
    script = (
        "mount -t tmpfs none /run && mount -t tmpfs none /etc/systemd && mkdir -p /run/systemd /etc/systemd"
        f" && cp '{settings}' /run/settings && cp /run/settings '/etc/systemd/journald@qwedge-test.conf'"
        f" && SYSTEMD_LOG_TARGET=console timeout -s KILL 1 {journald} qwedge-test"
    )
    done = attempt(*namespace(mounts=True), "sh", "-c", script)
    return "\n".join(line for line in done.stdout.splitlines() if "journald@qwedge-test.conf" in line)


def test_every_kernel_setting_exists() -> None:
    for line in (COMMON / "sysctl.d/80-qwedge.conf").read_text().splitlines():
        if line and not line.startswith("#"):
            key, value = (part.strip() for part in line.split("="))
            known = Path("/proc/sys", *key.split("."))
            assert int(value) >= 0
            assert known.exists(), key


def test_the_compressed_swap_leaves_most_of_the_memory_to_the_model() -> None:
    zram = directives(COMMON / "zram-generator.conf")["zram0"]
    # The generator is not in every distribution; its grammar is that of systemd's files, with expressions of `ram`.
    size = re.fullmatch(r"min\(ram / (\d+), (\d+)\)", zram["zram-size"])
    assert size is not None
    assert int(size[1]) >= 4
    assert zram["compression-algorithm"] in {"lz4", "zstd", "lzo-rle"}


@pytest.mark.parametrize("path", sorted(FIRMWARE.glob("*/systemd/qwedge-*.service")), ids=lambda path: path.parts[-3])
def test_units_of_the_boards_are_understood(tmp_path: Path, path: Path) -> None:
    install(tmp_path, ())
    unit = tmp_path / path.name
    unit.write_text(re.sub(r"^(ExecStart=-?)\S+", r"\1/bin/true", path.read_text(), flags=re.MULTILINE))
    assert run(need("systemd-analyze", "systemd"), "verify", unit, cwd=tmp_path) == ""


def directives(path: Path) -> dict[str, dict[str, str]]:
    """Sections of a file of systemd's; of a key that comes again the last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    return {name: dict(parser[name]) for name in parser.sections()}
