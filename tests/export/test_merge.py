"""Adapters merged into the weights: the sum that their definition asks for, whatever the checkpoint stores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import edge.cli
from edge.bundle import read_manifest
from edge.errors import AdapterError, CheckpointError, ConfigError
from export.checkpoint import Checkpoint, open_checkpoint
from export.merge import merge_adapters
from tests.export import packed, peft, tiny, tiny_qwen3_5

CONFIG = tiny.qwen3_config()
WEIGHTS = tiny.random_tensors(CONFIG)
SHAPES = {name: tensor.shape for name, tensor in WEIGHTS.items()}


def adapter(folder: Path, **options: Any) -> tuple[Path, tiny.Tensors]:
    tensors = peft.adapter_tensors(SHAPES, **options)
    return peft.write_adapter(folder, tensors), tensors


def assert_equal(checkpoint: Checkpoint, expected: tiny.Tensors) -> None:
    assert checkpoint.tensors.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(checkpoint.rows(name), values, rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(checkpoint.rows(name, 1, 2), checkpoint.rows(name)[1:2], err_msg=name)


@pytest.mark.parametrize(
    "write",
    [lambda path: tiny.write_folder(path, CONFIG), lambda path: tiny.write_gguf(path, CONFIG, kind=Kind.F32)],
    ids=["folder", "gguf"],
)
def test_weights_are_the_sum(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    first, a = adapter(tmp_path / "first", rank=8)
    second, b = adapter(tmp_path / "second", rank=4, targets=["v_proj", "down_proj"], layers=[1], seed=1)
    with open_checkpoint(write(tmp_path / "m.gguf")) as checkpoint:
        merged = merge_adapters(checkpoint, [first, second])
        assert_equal(merged, peft.merge(peft.merge(WEIGHTS, a, 2.0), b, 2.0))
        assert merged.notes[-2:] == (
            "the adapter first of rank 8 is merged into 14 matrices",
            "the adapter second of rank 4 is merged into 2 matrices",
        )
        assert_equal(checkpoint, WEIGHTS)


def test_integers_become_floats_where_something_is_added(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    model = packed.write_folder(tmp_path / "m", CONFIG, packed.gptq, settings)
    folder, tensors = adapter(tmp_path / "a", rank=4, targets=["q_proj", "k_proj"])
    with open_checkpoint(model.folder) as checkpoint:
        assert_equal(merge_adapters(checkpoint, [folder]), peft.merge(model.values, tensors, 2.0))


def test_linear_attention(tmp_path: Path) -> None:
    """Adapters of every projection, saved by a model that sees."""
    weights = tiny.random_tensors(tiny_qwen3_5.text_config())
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    targets = {*peft.ALL, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
    tensors = peft.adapter_tensors(shapes, 4, targets=targets)
    seeing = {name.replace("model.layers", "model.language_model.layers"): each for name, each in tensors.items()}
    folder = peft.write_adapter(tmp_path / "a", seeing)
    with open_checkpoint(tiny.write_folder(tmp_path / "m", tiny_qwen3_5.config())) as checkpoint:
        assert_equal(merge_adapters(checkpoint, [folder]), peft.merge(weights, tensors, 2.0))


def test_what_does_not_fit(tmp_path: Path) -> None:
    folder, tensors = adapter(tmp_path / "a", rank=4)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    half = peft.write_adapter(tmp_path / "half", tensors)
    other = peft.write_adapter(
        tmp_path / "other", peft.adapter_tensors({"model.layers.9.mlp.up_proj.weight": (9, 9)}, 4)
    )
    same, _ = adapter(tmp_path / "b" / "a", rank=4)
    with open_checkpoint(tiny.write_folder(tmp_path / "m", CONFIG)) as checkpoint:
        with pytest.raises(AdapterError, match="lora_B of up_proj in layer 1 is missing"):
            merge_adapters(checkpoint, [half])
        with pytest.raises(AdapterError, match="has no place in this model"):
            merge_adapters(checkpoint, [other])
        with pytest.raises(AdapterError, match="cannot be read"):
            merge_adapters(checkpoint, [tmp_path / "nothing"])
        with pytest.raises(ConfigError, match="two adapters are named a"):
            merge_adapters(checkpoint, [folder, same])
    lacking = tiny.write_folder(tmp_path / "lacking", CONFIG)
    tiny.write_safetensors(lacking / "model.safetensors", {name: WEIGHTS[name] for name in list(WEIGHTS)[:-1]})
    with open_checkpoint(lacking) as checkpoint, pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        merge_adapters(checkpoint, [folder])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.write_folder(tmp_path / "m", CONFIG)
    folder, _ = adapter(tmp_path / "style", rank=4)
    bundle = tmp_path / "bundle"
    assert edge.cli.run(["export", str(source), "-o", str(bundle), "--offline", "--merge", str(folder)]) == 0
    assert "note: the adapter style of rank 4 is merged into 14 matrices\n" in capsys.readouterr().err
    manifest = read_manifest(bundle)
    assert manifest.adapters == []
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert manifest.source.sha256[f"style/{file}"] == hashlib.sha256((folder / file).read_bytes()).hexdigest()
