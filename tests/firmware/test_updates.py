"""What RAUC's bundles and SWUpdate's images share: two slots for the program, and what is done on the device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.firmware.test_systemd import install
from tests.firmware.tools import FIRMWARE, attempt, need, run
from tests.firmware.updates import PYTHON_OF_DEVICE, VERSION, Device, new_device, seal, write_kit

UPDATE = FIRMWARE / "update"
PROGRAM = "/opt/qwedge/current/bin/qwedge"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of a kit."""
    need("mksquashfs", "squashfs-tools")
    folder = tmp_path_factory.mktemp("image")
    run(UPDATE / "make-application.sh", write_kit(folder / "kit"), folder / "made", "--python", PYTHON_OF_DEVICE)
    return folder / "made"


@pytest.fixture
def device(image: Path, tmp_path: Path) -> Iterator[Device]:
    """A device whose slot A was switched to and has worked."""
    with new_device(tmp_path / "device") as device:
        device.run("cp", image / "application.img", device.folder / "images/A.img")
        for command in (("set-primary", "A"), ("mount",), ("mark-good",)):
            device.slots(*command)
        yield device


def slot_in_use(device: Device) -> str:
    return device.run("cat", "/run/qwedge-slots/mounted").strip().removeprefix("QWEDGE_SLOT=")


def test_a_slot_without_a_program_is_left_at_once(device: Device) -> None:
    assert f"qwedge {VERSION}" in device.run(PROGRAM, "--version")
    device.slots("set-primary", device.slots("inactive"))
    assert "slot B cannot be mounted: it is left" in device.slots("mount")
    assert slot_in_use(device) == "A"
    assert (device.slots("get-primary"), device.slots("get-state", "B")) == ("A", "bad")


def test_ends_that_were_asked_for_and_a_served_minute_do_not_count(device: Device, image: Path) -> None:
    device.run("cp", image / "application.img", device.folder / "images/B.img")
    device.slots("set-primary", "B")
    for _ in range(5):
        device.slots("mount")
        device.slots("stopped", SERVICE_RESULT="success")
    assert slot_in_use(device) == "B"
    device.slots("on-trial")
    for result in ("signal", "watchdog"):
        device.slots("mount")
        device.slots("stopped", SERVICE_RESULT=result)
    device.slots("mark-good")
    assert device.attempt("/usr/lib/qwedge/qwedge-slots", "on-trial").returncode == 1
    for _ in range(5):
        device.slots("mount")
        device.slots("stopped", SERVICE_RESULT="exit-code")
    assert slot_in_use(device) == "B"


def test_without_a_slot_that_works_there_is_what_the_installer_put_there(device: Device) -> None:
    device.slots("set-state", "A", "bad")
    assert device.attempt("/usr/lib/qwedge/qwedge-slots", "get-primary").returncode == 1
    device.slots("mount")
    assert device.attempt("test", "-e", "/run/qwedge-slots/mounted").returncode == 1
    assert device.attempt("mountpoint", "-q", "/opt/qwedge").returncode != 0


def test_wrong_commands_change_nothing(device: Device) -> None:
    before = device.run("cat", "/var/lib/qwedge-slots/state")
    for words in (["set-primary", "C"], ["get-state"], ["remount"]):
        assert device.attempt("/usr/lib/qwedge/qwedge-slots", *words).returncode == 2
    assert device.run("cat", "/var/lib/qwedge-slots/state") == before


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("ARCH", "sparc", "this update is for sparc"),
        ("GLIBC_MINOR", "999", "this system's glibc is older than 2.999"),
        ("PYTHON", "/usr/bin/python2", "there is no /usr/bin/python2"),
    ],
)
def test_a_program_that_cannot_run_here_is_refused(
    image: Path, tmp_path: Path, field: str, value: str, error: str
) -> None:
    settings, text = tmp_path / "kit.env", (image / "kit.env").read_text()
    settings.write_text(re.sub(rf"^{field}=.*$", f"{field}={value}", text, flags=re.MULTILINE))
    refused = attempt("sh", UPDATE / "device.sh", "check", settings)
    assert (refused.returncode, f"error: {error}" in refused.stdout) == (1, True)


def test_a_damaged_kit_makes_no_image(tmp_path: Path) -> None:
    kit = write_kit(tmp_path / "kit")
    next((kit / "wheels").iterdir()).write_bytes(b"PK")
    assert "the kit is damaged" in attempt(UPDATE / "make-application.sh", kit, tmp_path / "other").stdout
    seal(kit, {"BOARD": "rk3588"})
    assert attempt(UPDATE / "make-application.sh", kit, tmp_path / "other").returncode != 0
    assert not (tmp_path / "other/application.img").exists()
    assert "is no kit" in attempt(UPDATE / "make-application.sh", tmp_path, tmp_path / "other").stdout


@pytest.mark.parametrize(
    "path", [UPDATE / "slots.conf", FIRMWARE / "rauc/rauc.service.d/qwedge.conf"], ids=lambda path: path.name
)
def test_units_are_understood(tmp_path: Path, path: Path) -> None:
    """Beside the unit that they add to, with programs that are here, since systemd looks."""
    unit = install(tmp_path, ())
    trial = re.sub(
        r"^ExecStart=\S+", "ExecStart=/bin/true", (UPDATE / "qwedge-mark-good.service").read_text(), flags=re.MULTILINE
    )
    (tmp_path / "qwedge-mark-good.service").write_text(trial)
    (tmp_path / "rauc.service").write_text("[Service]\nType=dbus\nBusName=de.pengutronix.rauc\nExecStart=/bin/true\n")
    drop_in = tmp_path / f"{'rauc' if path.parent != UPDATE else 'qwedge'}.service.d" / path.name
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text(re.sub(r"^(Exec\w+=\+?)/\S+", r"\1/bin/true", path.read_text(), flags=re.MULTILINE))
    names = [unit, tmp_path / "rauc.service", tmp_path / "qwedge-mark-good.service"]
    assert run(need("systemd-analyze", "systemd"), "verify", *names, cwd=tmp_path) == ""
    drop_in.write_text(drop_in.read_text().replace("Exec", "Exek"))
    assert "Exek" in attempt(need("systemd-analyze", "systemd"), "verify", *names, cwd=tmp_path).stdout
