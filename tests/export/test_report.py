"""What a recipe costs: the figures, the folder that keeps them, and the page that draws them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from edge.bundle import read_manifest
from edge.errors import ConfigError
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import recipe_named
from export.report import Quality, QualityReport, Row, Windows, compare
from export.report_page import page
from tests.export import tiny

ROW = Row("balanced", False, "float32", 439_000_000, 370_000_000, Quality(2048, 0.05, 1.0, 0.89, 19.0, 18.2))


def export(folder: Path, recipe: str, report: Path, checkpoint: Path) -> Path:
    with open_checkpoint(checkpoint) as opened:
        export_bundle(
            opened, folder / recipe, recipe_named(recipe), progress=Silent(), name="tiny", report=report, context=64
        )
    return folder / recipe


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.write_folder(tmp_path / "checkpoint", tiny.qwen2_config())


def test_exports_add_their_rows(tmp_path: Path, checkpoint: Path) -> None:
    report = tmp_path / "report"
    quality = {}
    for recipe in ("small", "fp32", "quality"):
        bundle = export(tmp_path, recipe, report, checkpoint)
        quality[recipe] = read_manifest(bundle).measured["quality"]
    assert quality["fp32"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < quality["quality"]["kl"] < quality["small"]["kl"]
    assert quality["quality"]["kl"] <= quality["quality"]["kl_p999"]
    assert quality["fp32"]["perplexity"] == pytest.approx(quality["fp32"]["reference_perplexity"], abs=1e-4)
    assert quality["small"]["tokens"] == 16 * 32
    rows = json.loads((report / "quality.json").read_text())["rows"]
    assert {row["recipe"] for row in rows} == quality.keys()
    sizes = [row["weight_bytes"] for row in rows]
    assert sizes == sorted(sizes)
    html = (report / "index.html").read_text()
    assert all(f">{recipe}</th>" in html for recipe in quality)
    assert sorted(path.name for path in report.iterdir()) == ["index.html", "quality.json"]
    assert not list(tmp_path.glob(".reference*"))


def test_a_folder_of_another_model_is_refused_before_the_work(tmp_path: Path, checkpoint: Path) -> None:
    report = tmp_path / "report"
    export(tmp_path, "quality", report, checkpoint)
    other = tiny.write_folder(tmp_path / "other", tiny.qwen2_config(num_hidden_layers=1))
    tuned = tiny.write_folder(tmp_path / "tuned", tiny.qwen2_config())
    tensors = tiny.random_tensors(tiny.qwen2_config())
    tensors["model.layers.1.mlp.up_proj.weight"] *= np.float32(2)
    tiny.write_safetensors(tuned / "model.safetensors", tensors)
    for source in (other, tuned):
        with pytest.raises(ConfigError, match="has the report of tiny"):
            export(tmp_path / "second", "quality", report, source)
        assert not (tmp_path / "second").exists()
    (report / "quality.json").write_text("[]")
    with pytest.raises(ConfigError, match="it is no report"):
        export(tmp_path / "third", "quality", report, checkpoint)


def test_divergence_and_perplexity_are_what_they_are_defined_as() -> None:
    windows = Windows(np.array([[0, 0, 0, 1], [0, 0, 1, 0]], np.int64))
    even, likely = np.log([[0.5, 0.5]] * 2).astype(np.float32), np.log([[0.2, 0.8]] * 2).astype(np.float32)
    found = compare([even, even], [likely + 3, even], windows)  # logits know no constant
    kl = 0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.8)
    assert found.tokens == 4
    assert found.kl == pytest.approx(kl / 2, abs=1e-6)
    assert found.kl_p999 == pytest.approx(kl, abs=1e-6)
    assert found.reference_perplexity == pytest.approx(2.0)
    # The first window's scored tokens are 0 and 1, the second's 1 and 0.
    assert found.perplexity == pytest.approx((0.2 * 0.8 * 0.5 * 0.5) ** (-1 / 4))
    assert found.top1 == 0.5


def test_a_newer_row_takes_the_place_of_an_older_one() -> None:
    report = QualityReport("qwen2", 1, "w", "t", "tiny")
    small = Row("small", True, "int8", 1_000, 900, ROW.quality)
    both = report.with_row(ROW).with_row(small).with_row(ROW)
    assert [row.name for row in both.rows] == ["small, calibrated, int8 cache", "balanced"]


def test_the_page_draws_peers_beside_and_loads_nothing() -> None:
    report = QualityReport("qwen2", 494032768, "w", "t", "<b>coder</b>").with_row(ROW)
    html = page(report)
    assert "<b>coder" not in html
    assert not re.search(r"<script|src=|href=|url\(", html)
    svg = ET.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    marks = {text.text for text in svg.iter("text")}
    assert {"balanced", "Q4_K_M with imatrix", "Q8_0"} <= marks
    places = {
        text.text: (float(text.attrib["x"]), float(text.attrib["y"]))
        for text in svg.iter("text")
        if text.text in {"Q4_0", "Q8_0"}
    }
    # Larger lies further right, better lies lower.
    assert places["Q4_0"][0] < places["Q8_0"][0]
    assert places["Q4_0"][1] < places["Q8_0"][1]
    assert "Q8_0" not in page(QualityReport("qwen2", 1, "w", "t", "tiny").with_row(ROW))
