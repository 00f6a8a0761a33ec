"""Adapters in an export: what lies in the bundle, and what is refused before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from pydantic import ValidationError

import edge.cli
from edge.bundle import GRAPH, AdapterEntry, Manifest, read_manifest, verify_bundle
from edge.errors import AdapterError, ConfigError
from export.checkpoint import open_checkpoint
from export.pipeline import Report, export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.export import peft, tiny

CONFIG = tiny.qwen3_config()
SHAPES = {name: tensor.shape for name, tensor in tiny.random_tensors(CONFIG).items()}


def export(tmp_path: Path, **options: Any) -> Report:
    with open_checkpoint(tiny.write_folder(tmp_path / "checkpoint", CONFIG)) as checkpoint:
        return export_bundle(checkpoint, tmp_path / "bundle", RECIPES["balanced"], progress=Silent(), **options)


def inputs(bundle: Path) -> dict[str, list[int | str]]:
    graph = ir.load(bundle / GRAPH).graph
    return {
        str(value.name): [dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()]
        for value in graph.inputs
    }


def test_a_bundle_with_adapters(tmp_path: Path) -> None:
    first = peft.write_adapter(tmp_path / "first", peft.adapter_tensors(SHAPES, 8), dtype="BF16")
    second = peft.write_adapter(tmp_path / "second", peft.adapter_tensors(SHAPES, 4, targets=["v_proj"]), lora_alpha=2)
    report = export(tmp_path, adapters={"style-1": first, "2": second})
    assert verify_bundle(report.folder) == report.manifest
    assert report.manifest.adapters == [
        AdapterEntry(name="2", file="adapter.2.safetensors", rank=4, scale=0.5),
        AdapterEntry(name="style-1", file="adapter.style-1.safetensors", rank=8, scale=2.0),
    ]
    stored = (report.folder / "adapter.style-1.safetensors").read_bytes()
    assert stored == (first / "adapter_model.safetensors").read_bytes()
    found = inputs(report.folder)
    linear = "q_proj+k_proj+v_proj"
    assert found[f"lora.{linear}.groups"] == [f"{linear}.groups", "batch", 1, 1]
    assert found[f"lora.1.{linear}.a"] == [3, f"{linear}.groups", 1, 64, f"{linear}.width"]
    assert found["lora.1.k_proj.b"] == [f"{linear}.rank", 64]
    assert found["lora.0.down_proj.a"] == [1, "down_proj.groups", 1, 96, "down_proj.width"]
    assert len([name for name in found if name.startswith("lora.")]) == 4 + 2 * (4 + 7)


def test_without_adapters_the_graph_has_no_places(tmp_path: Path) -> None:
    report = export(tmp_path)
    assert report.manifest.adapters == []
    assert not [name for name in inputs(report.folder) if name.startswith("lora.")]


@pytest.mark.parametrize("name", ["", "A", "a/b", "../a", ".a", "a:b", "a" * 65])
def test_names_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    adapter = peft.write_adapter(tmp_path / "adapter", peft.adapter_tensors(SHAPES, 4))
    with pytest.raises(ConfigError, match="cannot be an adapter's name"):
        export(tmp_path, adapters={name: adapter})
    assert not (tmp_path / "bundle").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    other = {name: tensor.shape for name, tensor in tiny.random_tensors(tiny.qwen2_config(hidden_size=128)).items()}
    adapter = peft.write_adapter(tmp_path / "adapter", peft.adapter_tensors(other, 4))
    with pytest.raises(AdapterError, match="instead of"):
        export(tmp_path, adapters={"a": adapter})
    with pytest.raises(AdapterError, match="cannot be read"):
        export(tmp_path / "again", adapters={"a": tmp_path / "nothing"})


def run(tmp_path: Path, *options: str) -> int:
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        tiny.write_folder(folder, CONFIG)
    return edge.cli.run(["export", str(folder), "-o", str(tmp_path / "bundle"), "--offline", "--name", "m", *options])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft.write_adapter(tmp_path / "a=b", peft.adapter_tensors(SHAPES, 4))
    assert run(tmp_path, "--adapter", f"one={adapter}", "--adapter", f"two={adapter}") == 0
    assert "adapter    m:one, rank 4\nadapter    m:two, rank 4\n" in capsys.readouterr().out
    assert [entry.name for entry in read_manifest(tmp_path / "bundle").adapters] == ["one", "two"]


@pytest.mark.parametrize("options", [["--adapter", "one"], ["--adapter", "one=x", "--adapter", "one=y"]])
def test_malformed_options(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *options) == 2
    assert "hint: write --adapter NAME=DIR" in capsys.readouterr().err


def test_a_manifest_lists_each_adapter_once_and_its_file(tmp_path: Path) -> None:
    manifest = export(tmp_path).manifest.model_dump()
    entry = {"name": "a", "file": "tokenizer.json", "rank": 4, "scale": 1.0}
    assert Manifest.model_validate({**manifest, "adapters": [entry]}).adapters[0].name == "a"
    for adapters in ([entry, entry], [{**entry, "file": "adapter.a.safetensors"}], [{**entry, "name": "A"}]):
        with pytest.raises(ValidationError):
            Manifest.model_validate({**manifest, "adapters": adapters})
