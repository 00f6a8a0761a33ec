"""SWUpdate's images of the program and of models, made, judged and installed by the real swupdate."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.firmware.tools import FIRMWARE, ROOT, attempt, need, run
from tests.firmware.updates import (
    BOARD,
    PYTHON_OF_DEVICE,
    VERSION,
    Device,
    new_device,
    write_authority,
    write_bundles,
    write_kit,
)

SWUPDATE = FIRMWARE / "swupdate"
MAKE = SWUPDATE / "make-image.sh"
ATTEMPTS = 5
"""Of asking: 2022.12 run by hand may end before it has installed anything, takes away files that it still reads, and
one of some thousand never ended."""
LIMITED = ("timeout", "--kill-after=5", "60")
"""What runs it, so that an attempt that never ends is one of :data:`ATTEMPTS`. Others take a second."""
SUCCESS = "SWUPDATE successful !"
"""What it says only of what it has done. "SWUpdate was successful !" it says of an early end too; its status is no
better."""


@dataclass(frozen=True)
class Made:
    """Images and what they were made of."""

    folder: Path
    """With the authority in ``authority``, bundles in ``bundles``, and a kit in ``kit``."""
    application: Path
    model: Path

    def signer(self, name: str = "signer") -> tuple[str, ...]:
        return ("--cert", f"{self.folder / 'authority' / name}.pem", "--key", f"{self.folder / 'authority' / name}.key")

    def check(self, image: Path, *, board: str = BOARD, revision: str = "1", authority: str = "authority") -> str:
        """What ``swupdate --check`` says of an image."""
        return attempt(
            *(*LIMITED, "swupdate", "--check", "--image", image),
            *("--select", "program,A", "--cert-purpose", "codeSigning"),
            *("--key", self.folder / authority / "ca.pem", "--hwrevision", f"{board}:{revision}", "--loglevel", "4"),
        ).stdout

    def takes(self, image: Path, **options: str) -> bool:
        """Whether it is taken, as it never is by mistake (see :data:`ATTEMPTS`)."""
        return any(SUCCESS in self.check(image, **options) for _ in range(ATTEMPTS))

    def refuses(self, reason: str, image: Path, **options: str) -> bool:
        """Whether it is refused for this reason, and never taken."""
        said = [self.check(image, **options)]
        while reason not in said[-1] and len(said) < ATTEMPTS:
            said.append(self.check(image, **options))
        return reason in said[-1] and not any(SUCCESS in each for each in said)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An image of the program and one of a model."""
    for tool, package in (("swupdate", "swupdate"), ("mksquashfs", "squashfs-tools"), ("cpio", "cpio")):
        need(tool, package)
    folder = tmp_path_factory.mktemp("swupdate")
    write_authority(folder / "authority")
    kit, bundles = write_kit(folder / "kit"), write_bundles(folder / "bundles")
    made = Made(folder, folder / "application.swu", folder / "model.swu")
    run(MAKE, kit, made.application, *made.signer(), "--python", PYTHON_OF_DEVICE)
    run(MAKE, bundles / "first", made.model, *made.signer())
    return made


def test_scripts_are_clean() -> None:
    shellcheck = need("shellcheck", "shellcheck")
    assert run(shellcheck, SWUPDATE / "hook.sh", MAKE) == ""
    assert run(shellcheck, "--shell=sh", "--exclude=SC2034", SWUPDATE / "10-qwedge") == ""


def test_images_are_taken_by_their_boards_alone(made: Made) -> None:
    assert made.takes(made.application)
    assert made.refuses("SW not compatible with hardware", made.application, revision="2")
    assert made.refuses("HW compatibility not found", made.application, board="rk3588")
    assert made.takes(made.model, board="rk3588", revision="7")


def test_what_another_authority_or_a_servers_certificate_signed_is_refused(made: Made, tmp_path: Path) -> None:
    write_authority(made.folder / "others")
    assert made.refuses("Authentication of all signatures failed", made.model, authority="others")
    run(MAKE, made.folder / "bundles/first", tmp_path / "server.swu", *made.signer("server"))
    assert made.refuses("Authentication of all signatures failed", tmp_path / "server.swu")
    refused = attempt("swupdate", "--check", "--image", made.model)
    assert "built for signed images" in refused.stdout


def unpack(image: Path, folder: Path) -> Path:
    folder.mkdir()
    with image.open("rb") as archive:
        subprocess.run(["cpio", "--quiet", "-i"], stdin=archive, cwd=folder, check=True)
    return folder


def pack(folder: Path, image: Path) -> Path:
    names = ["sw-description", "sw-description.sig", "hook.sh"]
    names += [name for name in ("application.img", "model.tar") if (folder / name).exists()]
    with image.open("wb") as archive:
        text = "\n".join(names).encode() + b"\n"
        subprocess.run(["cpio", "--quiet", "-o", "-H", "crc"], input=text, stdout=archive, cwd=folder, check=True)
    return image


@pytest.mark.parametrize("name", ["sw-description", "sw-description.sig"])
def test_a_changed_byte_of_what_is_signed_is_found(made: Made, tmp_path: Path, name: str) -> None:
    folder = unpack(made.application, tmp_path / "content")
    assert made.takes(pack(folder, tmp_path / "same.swu"))
    data = bytearray((folder / name).read_bytes())
    data[-20] ^= 1
    (folder / name).write_bytes(data)
    assert made.refuses("Signature verification failed", pack(folder, tmp_path / "changed.swu"))


def test_descriptions_are_filled_in(made: Made, tmp_path: Path) -> None:
    templates = {made.application: "application.sw-description", made.model: "model.sw-description"}
    for image, template in templates.items():
        folder = unpack(image, tmp_path / image.stem)
        assert "@" in (SWUPDATE / template).read_text()
        text = (folder / "sw-description").read_text()
        assert "@" not in "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        for name, digest in re.findall(r'filename = "([^"]+)".*sha256 = "([0-9a-f]{64})"', text):
            assert run("sha256sum", folder / name).split()[0] == digest
        assert run("sh", "-n", folder / "hook.sh") == ""


def test_make_signs_an_image(made: Made, tmp_path: Path) -> None:
    keys = (f"CERT={made.folder}/authority/signer.pem", f"KEY={made.folder}/authority/signer.key")
    out = tmp_path / "second.swu"
    run("make", "swupdate-image", f"FROM={made.folder}/bundles/second", f"OUT={out}", *keys, cwd=ROOT)
    assert made.takes(out)
    for words, error in ((("--sign", "x"), "--sign is no option"), (("--key", "ROOT"), "nothing says who signs")):
        refused = attempt(MAKE, made.folder / "kit", tmp_path / "x.swu", *words)
        assert (refused.returncode, error in refused.stdout) == (2, True)


@pytest.fixture
def device(made: Made, tmp_path: Path) -> Iterator[Device]:
    """A device with SWUpdate's settings as they are here."""
    with new_device(tmp_path / "device") as device:
        device.run("mkdir", "-p", "/etc/swupdate/conf.d", "/var/lib/qwedge-slots")
        device.run("cp", SWUPDATE / "swupdate.cfg", made.folder / "authority/ca.pem", "/etc/swupdate/")
        device.run("cp", SWUPDATE / "10-qwedge", "/etc/swupdate/conf.d/")
        device.run("cp", made.folder / "bundles/keys/plant.pub", "/etc/qwedge/trusted/")
        device.run("sh", "-c", f"echo {BOARD} 1 >/etc/hwrevision")
        yield device


def update(device: Device, image: Path) -> str:
    """Install an image as the service would, with the arguments that its configuration gives; returns what it says."""
    return device.attempt(
        *("sh", "-c", f". /etc/swupdate/conf.d/10-qwedge && {' '.join(LIMITED)} swupdate $SWUPDATE_ARGS -i '{image}'")
    ).stdout


def update_until(device: Device, image: Path, is_there: Callable[[], object]) -> None:
    """Install until it is there: run by hand, SWUpdate 2022.12 sometimes ends before it has installed anything."""
    said = ""
    for _ in range(ATTEMPTS):
        said = update(device, image)
        if is_there():
            return
    pytest.fail(said)


def update_to(device: Device, image: Path, slot: str) -> None:
    """Install until this slot is the one to start."""

    def is_primary() -> bool:
        return device.attempt("/usr/lib/qwedge/qwedge-slots", "get-primary").stdout.strip() == slot

    update_until(device, image, is_primary)


def test_a_program_is_installed_and_tried(made: Made, device: Device) -> None:
    update_to(device, made.application, "A")
    device.slots("mount")
    assert f"qwedge {VERSION}" in device.run("/opt/qwedge/current/bin/qwedge", "--version")
    # B is what has worked before, or would be: it is not written to while A is on trial.
    update(device, made.application)
    assert (device.slots("get-primary"), device.slots("get-state", "B")) == ("A", "bad")
    device.slots("mark-good")
    update_to(device, made.application, "B")
    assert device.slots("inactive") == "B"
    device.slots("on-trial")


def test_the_slot_in_use_is_not_written_to(made: Made, device: Device) -> None:
    for command in (("set-primary", "A"), ("mark-good",)):
        device.slots(*command)
    device.run("sh", "-c", "echo QWEDGE_SLOT=A >/run/qwedge-slots/mounted")
    before = device.run("sha256sum", "/run/qwedge-slots/A")
    device.attempt(*LIMITED, "swupdate", "-f", "/etc/swupdate/swupdate.cfg", "-e", "program,A", "-i", made.application)
    assert device.run("sha256sum", "/run/qwedge-slots/A") == before


@pytest.mark.parametrize("name", ["application", "model"])
def test_a_changed_byte_of_the_content_is_never_switched_to(
    made: Made, device: Device, tmp_path: Path, name: str
) -> None:
    folder = unpack(getattr(made, name), tmp_path / "content")
    content = folder / {"application": "application.img", "model": "model.tar"}[name]
    data = bytearray(content.read_bytes())
    data[len(data) // 2] ^= 1
    content.write_bytes(data)
    update(device, pack(folder, tmp_path / "changed.swu"))
    assert device.attempt("/usr/lib/qwedge/qwedge-slots", "get-primary").returncode == 1
    assert not device.bundles()


def test_a_model_goes_to_the_store_on_trial(made: Made, device: Device, tmp_path: Path) -> None:
    update_until(device, made.model, device.bundles)
    (installed,) = device.bundles()
    assert (installed["model"], installed["active"], installed["signed_by"]) == ("first", True, "plant")
    assert '"starts": 0' in device.run("cat", "/var/lib/qwedge/models/state.json")
    unsigned = tmp_path / "unsigned"
    shutil.copytree(made.folder / "bundles/second", unsigned)
    (unsigned / "manifest.sig").unlink()
    run(MAKE, unsigned, tmp_path / "unsigned.swu", *made.signer())
    update(device, tmp_path / "unsigned.swu")
    assert [each["model"] for each in device.bundles()] == ["first"]
    assert device.attempt("test", "-e", "/var/lib/qwedge-slots/model.tar").returncode == 1
