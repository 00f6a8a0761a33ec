"""The Yocto layer: its linter, its list of wheels beside the lock, its files where it looks for them.

bitbake needs OpenEmbedded-Core, which is in no package index: docs/firmware.md says what was parsed by hand.
"""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from edge import __version__
from tests.firmware.test_systemd import install
from tests.firmware.tools import FIRMWARE, ROOT, attempt, missing, need, run

LAYER = FIRMWARE / "yocto/meta-qwedge"
RECIPES = sorted(LAYER.rglob("*.bb"))
QWEDGE = LAYER / "recipes-qwedge/qwedge/qwedge_0.1.0.bb"
RELEASES = ("scarthgap", "styhead", "walnascar", "whinlatter", "wrynose")
SUPPRESSED = {
    "oelint.var.mandatoryvar.HOMEPAGE": "there is none",
    "oelint.var.suggestedvar.BUGTRACKER": "there is none",
    "oelint.var.suggestedvar.CVE_PRODUCT": "nobody lists vulnerabilities of it",
    "oelint.var.bbclassextend": "nothing of it runs while an image is built",
    "oelint.vars.fileextrapaths": "units, settings and wheels lie outside of the layer",
    "oelint.vars.outofcontext": "the same",
    "oelint.vars.insaneskip": "wheels are not built here",
    "oelint.var.licenseremotefile": "wheels carry no licence file of ours",
    "oelint.vars.layerconf": "recipes share where firmware-configs is; an image feature is one",
    "oelint.vars.mispell.unknown": "they are ours",
    "oelint.vars.dependsordered": "it does not understand expressions",
}


@pytest.fixture
def linter() -> Path:
    """oelint-adv, in an environment of its own."""
    found = ROOT / ".venv-yocto/bin/oelint-adv"
    if not found.exists():
        missing("this test needs oelint-adv: make yocto-lint")
    return found


def lint(linter: Path, folder: Path, *options: str) -> str:
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".bb", ".inc", ".conf"})
    suppressed = [word for rule in SUPPRESSED for word in ("--suppress", rule)]
    return attempt(
        linter, "--quiet", "--jobs=1", *suppressed, *options, *files, env={"HOME": os.devnull}
    ).stdout.strip()


def test_recipes_are_clean(linter: Path) -> None:
    assert lint(linter, LAYER, f"--release={RELEASES[-1]}") == ""


def test_a_fault_would_be_found(linter: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipes-qwedge/qwedge-board/qwedge-board_1.0.bb"
    recipe.parent.mkdir(parents=True)
    text = (LAYER / recipe.relative_to(tmp_path)).read_text()
    recipe.write_text(text.replace("do_install()", "do_instal()").replace('SECTION = "net"\n', ""))
    assert "SECTION" in lint(linter, tmp_path, f"--release={RELEASES[0]}")


def test_the_recipe_has_the_wheels_of_the_lock_and_no_others() -> None:
    generator = runpy.run_path(str(ROOT / ".ci/yocto_wheels.py"))
    text = (LAYER / "recipes-qwedge/qwedge/qwedge-wheels.inc").read_text()
    lock = (ROOT / ".locks/runtime.txt").read_text()
    assert list(generator["check"](text, lock)) == []
    assert list(generator["check"](text, lock.replace("numpy==", "numpy==9"))) != []
    assert list(generator["check"](re.sub(r".*tokenizers.*\n", "", text), lock)) != []


def test_the_recipe_is_of_this_version_and_the_layer_of_these_releases() -> None:
    assert QWEDGE.name == f"qwedge_{__version__}.bb"
    compatible = re.findall(
        r'^LAYERSERIES_COMPAT_qwedge = "(.*)"$', (LAYER / "conf/layer.conf").read_text(), re.MULTILINE
    )
    assert compatible == [" ".join(RELEASES)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_files_lie_where_they_are_looked_for(recipe: Path) -> None:
    folders = (FIRMWARE / "common", FIRMWARE / "generic-arm64", FIRMWARE / "x86-n100", recipe.parent / "files")
    for name in re.findall(r"file://([\w./-]+)(?= \\|\n)", recipe.read_text()):
        assert any((folder / name).exists() for folder in folders) or name.startswith("qwedge-$"), name


def test_the_models_unit_is_understood(tmp_path: Path) -> None:
    install(tmp_path, ())
    source = LAYER / "recipes-qwedge/qwedge-model/files/qwedge-model.service"
    (tmp_path / source.name).write_text(
        re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", source.read_text(), flags=re.MULTILINE)
    )
    assert run(need("systemd-analyze", "systemd"), "verify", tmp_path / source.name, cwd=tmp_path) == ""


def test_tasks_are_shell(tmp_path: Path) -> None:
    """The bodies of ``do_install``, with bitbake's variables as the shell's."""
    shell = {
        path: re.findall(r"^do_install\(\) \{\n(.*?)^\}", path.read_text(), re.MULTILINE | re.DOTALL)
        for path in RECIPES
    }
    found: list[Any] = [body for bodies in shell.values() for body in bodies]
    assert len(found) == len(RECIPES) - 1  # a group of packages installs nothing
    for body in found:
        script = tmp_path / "install.sh"
        script.write_text(f"#!/bin/sh\n{body}")
        run("sh", "-n", script)
