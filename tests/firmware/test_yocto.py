"""The Yocto layer: its linter, its list of wheels beside the lock, its files where it looks for them.

bitbake needs OpenEmbedded-Core, which is in no package index: docs/firmware.md says what was parsed by hand.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from edge import __version__
from tests.firmware.test_systemd import install
from tests.firmware.tools import FIRMWARE, ROOT, attempt, missing, need, run
from tests.firmware.updates import VERSION, write_kit

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


VARIABLES = {
    "PV": VERSION,
    "PYTHON": sys.executable,
    "PYTHON_BASEVERSION": "3.13",
    "QWEDGE_LOCKED": "",
    "QWEDGE_FILES": "edge.toml",
    "bindir": "/usr/bin",
    "datadir": "/usr/share",
    "nonarch_libdir": "/usr/lib",
    "sysconfdir": "/etc",
    "systemd_system_unitdir": "/usr/lib/systemd/system",
}
EXPECTED = {
    "qwedge": {
        "opt/qwedge/current/bin/python",
        "opt/qwedge/current/bin/qwedge",
        "opt/qwedge/current/lib/python3.13/site-packages/edge/cli.py",
        "opt/qwedge/current/pyvenv.cfg",
        "usr/bin/qwedge",
        "usr/lib/systemd/system/qwedge.service",
        "usr/lib/tmpfiles.d/qwedge.conf",
    },
    "qwedge-board": {
        "etc/qwedge/edge.toml",
        "usr/lib/systemd/system/qwedge.service.d/board.conf",
        "usr/lib/systemd/journald.conf.d/qwedge.conf",
    },
    "qwedge-model": {"usr/share/qwedge/model/edge.toml", "usr/lib/systemd/system/qwedge-model.service"},
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
    assert {path.name for path in RECIPES} == {
        "packagegroup-qwedge.bb",
        QWEDGE.name,
        "qwedge-board_1.0.bb",
        "qwedge-model_1.0.bb",
    }


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


@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if "packagegroup" not in path.name], ids=lambda path: path.name
)
def test_what_recipes_install(recipe: Path, tmp_path: Path) -> None:
    """``do_install`` itself, whose variables of bitbake are the shell's here."""
    (body,) = re.findall(r"^do_install\(\) \{\n(.*?)^\}", recipe.read_text(), re.MULTILINE | re.DOTALL)
    sources, kit = tmp_path / "sources", write_kit(tmp_path / "kit")
    for folder in (FIRMWARE / "common", FIRMWARE / "generic-arm64", recipe.parent / "files", kit / "wheels"):
        if folder.exists():
            shutil.copytree(folder, sources, dirs_exist_ok=True)
    run(
        "sh",
        "-euc",
        re.sub(r"\$\{PN\}", recipe.name, body),
        env=VARIABLES | {"D": f"{tmp_path}/image", "UNPACKDIR": str(sources)},
    )
    installed = {
        str(path.relative_to(tmp_path / "image")) for path in (tmp_path / "image").rglob("*") if not path.is_dir()
    }
    assert EXPECTED[recipe.name.partition("_")[0]] <= installed
    if recipe == QWEDGE:
        assert run("sh", "-n", tmp_path / "image/usr/bin/qwedge") == ""
        assert any(name.endswith(".pyc") for name in installed)
