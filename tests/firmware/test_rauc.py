"""RAUC's bundles of the program and of models, made, judged and installed by the real rauc."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.firmware.tools import FIRMWARE, ROOT, attempt, need, run
from tests.firmware.updates import (
    BOARD,
    PACKAGES,
    PYTHON_OF_DEVICE,
    VERSION,
    Device,
    new_device,
    write_authority,
    write_bundles,
    write_kit,
)

RAUC = FIRMWARE / "rauc"
MAKE = RAUC / "make-bundle.sh"
CAN_VERITY = Path("/sys/module/dm_verity").exists()


@dataclass(frozen=True)
class Made:
    """Bundles and what they were made of."""

    folder: Path
    """With the authority in ``authority``, bundles in ``bundles``, and a kit in ``kit``."""
    application: Path
    model: Path

    @property
    def signer(self) -> tuple[str, ...]:
        return signer(self.folder)

    @property
    def keyring(self) -> str:
        return f"--keyring={self.folder / 'authority/ca.pem'}"


def signer(folder: Path, name: str = "signer") -> tuple[str, ...]:
    return ("--cert", f"{folder / 'authority' / name}.pem", "--key", f"{folder / 'authority' / name}.key")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle of the program and one of a model."""
    need("rauc", "rauc"), need("mksquashfs", "squashfs-tools")
    folder = tmp_path_factory.mktemp("rauc")
    write_authority(folder / "authority")
    kit, bundles = write_kit(folder / "kit"), write_bundles(folder / "bundles")
    made = Made(folder, folder / "application.raucb", folder / "model.raucb")
    run(MAKE, kit, made.application, *made.signer, "--python", PYTHON_OF_DEVICE)
    run(MAKE, bundles / "first", made.model, *made.signer)
    return made


def test_scripts_are_clean() -> None:
    shellcheck = need("shellcheck", "shellcheck")
    names = ("qwedge-slots", "device.sh", "make-application.sh", "make-model.sh")
    assert run(shellcheck, *(FIRMWARE / "update" / name for name in names), RAUC / "hook.sh", MAKE) == ""


def test_bundles_say_what_they_are(made: Made) -> None:
    said = run("rauc", made.keyring, "info", made.application)
    assert re.search(rf"Compatible:\s+'qwedge-{BOARD}'", said), said
    assert "Bundle Format: 	verity" in said
    assert re.search(r"\[application\].*\n\s+Filename:\s+application.img", said)
    assert "Verified inline signature by 'CN = signer'" in said
    said = run("rauc", made.keyring, "info", made.model)
    assert re.search(r"Version:\s+'1-[0-9a-f]{12}'", said)
    assert re.search(r"\[model\].*\n\s+Filename:\s+model.tar", said)


def test_what_is_unpacked_is_what_was_packed(made: Made, tmp_path: Path) -> None:
    run("rauc", made.keyring, "extract", made.model, tmp_path / "model")
    run("mkdir", tmp_path / "bundle")
    run("tar", "-xf", tmp_path / "model/model.tar", "-C", tmp_path / "bundle")
    run("diff", "-r", made.folder / "bundles/first", tmp_path / "bundle")
    run("rauc", made.keyring, "extract", made.application, tmp_path / "application")
    run("unsquashfs", "-q", "-d", tmp_path / "root", tmp_path / "application/application.img")
    assert "from edge.cli import main" in (tmp_path / "root/current/bin/qwedge").read_text()
    assert list((tmp_path / "root/current").glob("lib/python3.*/site-packages/edge/__pycache__/cli.*.pyc"))


def test_manifests_are_filled_in(made: Made, tmp_path: Path) -> None:
    for bundle, template in ((made.application, "application.raucm"), (made.model, "model.raucm")):
        run("rauc", made.keyring, "extract", bundle, tmp_path / bundle.stem)
        assert "@" in (RAUC / template).read_text()
        assert "@" not in (tmp_path / bundle.stem / "manifest.raucm").read_text()
        assert {path.name for path in (tmp_path / bundle.stem).iterdir()} >= {"device.sh", "hook.sh"}


def test_make_signs_a_bundle(made: Made, tmp_path: Path) -> None:
    keys = (f"CERT={made.folder}/authority/signer.pem", f"KEY={made.folder}/authority/signer.key")
    out = tmp_path / "second.raucb"
    run("make", "rauc-bundle", f"FROM={made.folder}/bundles/second", f"OUT={out}", *keys, cwd=ROOT)
    assert "the model second for qwedge" in run("rauc", made.keyring, "info", out)


def test_the_same_input_gives_the_same_image(made: Made, tmp_path: Path) -> None:
    for name in ("first", "second"):
        run(FIRMWARE / "update/make-application.sh", made.folder / "kit", tmp_path / name)
        run(FIRMWARE / "update/make-model.sh", made.folder / "bundles/first", tmp_path / name)
    run("diff", "-r", tmp_path / "first", tmp_path / "second")


def test_what_another_authority_signed_is_refused(made: Made, tmp_path: Path) -> None:
    other = write_authority(tmp_path / "authority")
    refused = attempt("rauc", f"--keyring={other / 'ca.pem'}", "info", made.model)
    assert refused.returncode != 0
    assert "signature verification failed" in refused.stdout


@pytest.mark.parametrize("place", ["content", "signature", "cut"])
def test_a_changed_byte_is_found(made: Made, tmp_path: Path, place: str) -> None:
    """In the signature at once; in the content by the hash tree, which `extract` checks and the kernel as it reads."""
    data = bytearray(made.model.read_bytes())
    changed = tmp_path / "changed.raucb"
    if place == "cut":
        del data[-4096:]
    else:
        data[20_000 if place == "content" else -200] ^= 1
    changed.write_bytes(data)
    assert attempt("rauc", made.keyring, "extract", changed, tmp_path / "out").returncode != 0
    assert not (tmp_path / "out/model.tar").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--cert", "x.pem"), "the certificate has no key"),
        (("--key", "x.pem"), "nothing says who signs"),
        (("--sign", "x.pem"), "--sign is no option"),
    ],
)
def test_wrong_options_are_refused(made: Made, tmp_path: Path, options: tuple[str, ...], error: str) -> None:
    refused = attempt(MAKE, made.folder / "kit", tmp_path / "out.raucb", *options)
    assert (refused.returncode, f"error: {error}" in refused.stdout) == (2, True)
    assert "is neither a kit nor a bundle" in attempt(MAKE, tmp_path, tmp_path / "out.raucb", *made.signer).stdout
    assert "is there already" in attempt(MAKE, made.folder / "kit", made.model, *made.signer).stdout


@pytest.fixture(scope="module")
def device(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """A device with RAUC's settings as they are here, made for its board."""
    folder = tmp_path_factory.mktemp("device") / "device"
    text = (RAUC / "system.conf").read_text().replace("@BOARD@", BOARD)
    if not CAN_VERITY:
        text = text.replace("bundle-formats=verity", "bundle-formats=plain")
    with new_device(folder) as device:
        copy(device, text, "/etc/rauc/system.conf")
        copy(device, (made.folder / "authority/ca.pem").read_text(), "/etc/rauc/keyring.pem")
        copy(device, (made.folder / "bundles/keys/plant.pub").read_text(), "/etc/qwedge/trusted/plant.pub")
        device.run("mkdir", "/var/lib/rauc")
        yield device


def copy(device: Device, text: str, path: str) -> None:
    device.run("sh", "-c", 'mkdir -p "$(dirname "$2")" && printf %s "$1" >"$2"', "sh", text, path)


def installable(made: Made, bundle: Path, folder: Path) -> Path:
    """The bundle itself, or, where the kernel checks no hash trees, the same content in the format that needs none."""
    if CAN_VERITY:
        return bundle
    content, plain = folder / "content", folder / f"{bundle.stem}-plain.raucb"
    run("rauc", made.keyring, "extract", bundle, content)
    manifest = content / "manifest.raucm"
    text = re.sub(r"^verity-.*\n", "", manifest.read_text(), flags=re.MULTILINE)
    manifest.write_text(text.replace("format=verity", "format=plain"))
    run("rauc", *signer(made.folder), "bundle", content, plain)
    run("rm", "-r", content)
    return plain


@contextmanager
def rauc_service(device: Device) -> Iterator[dict[str, str]]:
    """The service as its drop-in starts it, on a bus of its own; gives the environment that finds it."""
    drop_in = (RAUC / "rauc.service.d/qwedge.conf").read_text()
    (command,) = re.findall(r"^ExecStart=(/.*)$", drop_in, re.MULTILINE)
    (slot,) = re.findall(r"^Environment=QWEDGE_SLOT=(.*)$", drop_in, re.MULTILINE)
    script = f"""
        QWEDGE_SLOT={slot}; [ ! -f /run/qwedge-slots/mounted ] || . /run/qwedge-slots/mounted
        dbus-daemon --session --address=unix:path={device.folder}/bus --nofork --nopidfile 2>/dev/null & bus=$!
        trap 'kill $bus $rauc' TERM
        while [ ! -S {device.folder}/bus ]; do sleep 0.05; done
        {command} & rauc=$!
        wait
    """
    environment = {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={device.folder}/bus"}
    need("dbus-daemon", "dbus-daemon")
    log = device.folder.parent / "rauc.log"
    with (
        log.open("a") as errors,
        subprocess.Popen(
            [*device.enter, "sh", "-c", script],
            env=os.environ | environment | {"PYTHONPATH": PACKAGES},
            stdout=errors,
            stderr=errors,
        ) as service,
    ):
        deadline = time.monotonic() + 30
        while device.attempt("rauc", "status", **environment).returncode != 0:
            assert time.monotonic() < deadline, log.read_text()
        try:
            yield environment
        finally:
            service.send_signal(signal.SIGTERM)
            device.run("rm", "-f", f"{device.folder}/bus")


def test_a_program_is_installed_tried_and_left_again(made: Made, device: Device, tmp_path: Path) -> None:
    """The way of a device: its first program, a second one, and back because that does not stay."""
    bundle = installable(made, made.application, tmp_path)
    with rauc_service(device) as bus:
        device.run("rauc", "install", bundle, **bus)
    first = device.slots("get-primary")
    second = {"A": "B", "B": "A"}[first]
    device.slots("mount")
    assert f"qwedge {VERSION}" in device.run("/opt/qwedge/current/bin/qwedge", "--version")
    with rauc_service(device) as bus:
        refused = device.attempt("rauc", "install", bundle, **bus)
        assert "has not shown yet that it works" in refused.stdout
        device.slots("mark-good")
        device.run("rauc", "install", bundle, **bus)
        assert re.search(rf"Activated: application.. \({second}\)", device.run("rauc", "status", **bus))
    for _ in range(3):
        device.slots("mount")
        assert f"/{second}.img" in device.run("losetup", "--list", "--output=BACK-FILE")
    assert f"slot {second} ended 3 times" in device.slots("mount")
    assert device.slots("get-primary") == first
    assert device.slots("get-state", second) == "bad"
    with rauc_service(device) as bus:
        assert re.search(rf"Booted from: application.. \({first}\)", device.run("rauc", "status", **bus))


def test_a_program_that_does_not_start_here_is_never_switched_to(made: Made, device: Device, tmp_path: Path) -> None:
    content = tmp_path / "broken"
    bundle = installable(made, made.application, tmp_path)
    run("rauc", made.keyring, "extract", bundle, content)
    run("unsquashfs", "-q", "-d", tmp_path / "root", content / "application.img")
    (tmp_path / "root/current/lib").rename(tmp_path / "root/current/lib32")
    run("mksquashfs", tmp_path / "root", content / "application.img", "-noappend", "-quiet", "-no-progress")
    run("rauc", *made.signer, "bundle", content, tmp_path / "broken.raucb")
    before = device.attempt("/usr/lib/qwedge/qwedge-slots", "get-primary").stdout
    with rauc_service(device) as bus:
        refused = device.attempt("rauc", "install", tmp_path / "broken.raucb", **bus)
    assert refused.returncode != 0
    assert device.attempt("/usr/lib/qwedge/qwedge-slots", "get-primary").stdout == before


def test_a_model_goes_to_the_store_on_trial(made: Made, device: Device, tmp_path: Path) -> None:
    bundle = installable(made, made.model, tmp_path)
    before = device.attempt("/usr/lib/qwedge/qwedge-slots", "get-primary").stdout
    with rauc_service(device) as bus:
        device.run("rauc", "install", bundle, **bus)
    (installed,) = device.bundles()
    assert (installed["model"], installed["active"], installed["signed_by"]) == ("first", True, "plant")
    assert '"starts": 0' in device.run("cat", "/var/lib/qwedge/models/state.json")
    assert device.attempt("/usr/lib/qwedge/qwedge-slots", "get-primary").stdout == before


def test_what_a_servers_certificate_signed_is_not_installed(made: Made, device: Device, tmp_path: Path) -> None:
    run("rauc", made.keyring, "extract", installable(made, made.model, tmp_path), tmp_path / "content")
    run("rauc", *signer(made.folder, "server"), "bundle", tmp_path / "content", tmp_path / "server.raucb")
    with rauc_service(device) as bus:
        refused = device.attempt("rauc", "install", tmp_path / "server.raucb", **bus)
    assert "signature verification failed" in refused.stdout


@pytest.mark.parametrize(
    ("bundle", "system", "status", "said"),
    [
        ("qwedge-raspberry-pi-5", "qwedge-raspberry-pi-5", 0, ""),
        ("qwedge-raspberry-pi-5", "qwedge-rk3588", 10, "this bundle is for qwedge-raspberry-pi-5"),
        ("qwedge", "qwedge-rk3588", 0, ""),
        ("qwedge", "fridge", 10, "not made for qwedge"),
    ],
)
def test_bundles_for_other_systems_are_refused(bundle: str, system: str, status: int, said: str) -> None:
    environment = {"RAUC_MF_COMPATIBLE": bundle, "RAUC_SYSTEM_COMPATIBLE": system}
    done = attempt("sh", RAUC / "hook.sh", "install-check", env=environment)
    assert (done.returncode, said in done.stdout) == (status, True)
