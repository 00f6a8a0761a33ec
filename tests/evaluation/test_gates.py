"""``qwedge activate --require``: a bundle is switched to when it can do what it must."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import edge.cli
from edge.bundle import read_manifest, sign_bundle
from edge.commands import gates
from edge.signing import PrivateKey, Trust, make_keys
from edge.store import Store
from export.quantize.recipes import RECIPES
from tests.export import tiny
from tests.tiny_bundles import export_tiny

EASY = "prompts: [hello]\noptions: {max_tokens: 4}\ntests:\n  - assert: [{type: regex, value: '.*'}]\n"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    export_tiny(tmp_path, tiny.qwen2_config(), RECIPES["int8"], name="tiny")
    return tmp_path / "bundle"


def test_a_bundle_must_reach_what_is_required(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("QWEDGE_")]:
        monkeypatch.delenv(name)
    easy, hard = tmp_path / "easy.yaml", tmp_path / "hard.yaml"
    easy.write_text(EASY)
    hard.write_text(EASY.replace("'.*'", "'^cannot be said$'"))
    store = ["--store", str(tmp_path / "store")]
    assert edge.cli.run(["install", str(bundle), *store]) == 0
    assert edge.cli.run(["activate", "tiny", *store, "--no-test", "--require", f"{hard}:0.5"]) != 0
    told = capsys.readouterr().err
    assert "does not pass" in told
    assert "the score 0 is below the required 0.5" in told
    assert edge.cli.run(["activate", "tiny", *store, "--no-test", "--require", f"{easy}:1"]) == 0
    assert "active" in capsys.readouterr().out


def test_a_signed_manifest_is_believed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    easy = tmp_path / "easy.yaml"
    easy.write_text(EASY)
    assert edge.cli.run(["eval", str(easy), "--bundle", str(bundle), "--record", "--threads", "1"]) == 0
    summary = read_manifest(bundle).measured["evaluations"]["easy"]
    assert (summary["score"], summary["cases"]) == (1.0, 1)
    make_keys(tmp_path / "keys", "plant")
    sign_bundle(bundle, PrivateKey.load(tmp_path / "keys" / "plant.key"))
    assert edge.cli.run(["eval", str(easy), "--bundle", str(bundle), "--record", "--threads", "1"]) == 5
    assert "is signed" in capsys.readouterr().err
    trust = tmp_path / "trust"
    trust.mkdir()
    shutil.copy(tmp_path / "keys" / "plant.pub", trust)
    store = ["--store", str(tmp_path / "store"), "--trust", str(trust)]
    assert edge.cli.run(["install", str(bundle), *store]) == 0
    # Nothing is evaluated: the bundle could not be asked this way.
    monkeypatch.setattr(gates, "_evaluate", _never)
    assert edge.cli.run(["activate", "tiny", *store, "--no-test", "--require", f"{easy}:1"]) == 0
    easy.write_text(EASY.replace("hello", "other"))
    with pytest.raises(AssertionError):
        gates.score_gates([f"{easy}:1"], None)[0](Store(tmp_path / "store", trust=Trust(trust)).find("tiny"))


def _never(*_: object) -> None:
    raise AssertionError


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["activate", "tiny", "--require", "factory"], "is no SUITE:SCORE"),
        (["activate", "tiny", "--require", "factory:2"], "is no SUITE:SCORE"),
        (["activate", "tiny", "--require", "nonsense:0.5"], "there is no suite"),
        (["activate", "tiny", "--require", "code:0.5"], "executes code"),
        (["install", "tiny", "--require", "factory:0.5"], "add --activate"),
    ],
)
def test_wrong_requirements_are_said_at_once(
    args: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edge.cli.run([*args, "--store", str(tmp_path)]) == 2
    assert error in capsys.readouterr().err
