"""The original that a graph under calibration is compared with, product by product."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.architectures import architecture_for
from export.checkpoint import open_checkpoint
from export.graph import GraphBuilder
from export.quantize.recipes import RECIPES, Float32
from export.reference import Original, Reference
from export.segments import between
from export.weights import DataFile, Weights, to_nearest
from tests.export import tiny, tiny_qwen3_5

SHAPES = {
    "qwen2": tiny.qwen2_config(),
    "qwen3-untied": tiny.qwen3_config(tie_word_embeddings=False, num_key_value_heads=1),
    "qwen3_5": tiny_qwen3_5.config(linear_num_value_heads=4),
}
CONTEXT = 64
WINDOWS = [np.arange(start, start + count)[None] for start, count in ((0, 40), (100, 31))]


@pytest.mark.parametrize("recipe", ["balanced", "small"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_lacks_what_its_inputs_lack(shape: str, recipe: str, tmp_path: Path) -> None:
    """The same graph in float32, whole, lacks nothing; inputs that are off by something lack that."""
    rng = np.random.default_rng(0)
    places: list[tuple[str, str, ir.Value]] = []

    def note(graph: GraphBuilder, x: ir.Value, name: str, form: Any) -> Any:
        del form
        places.append((name, str(graph.cuts[-1].name), x))
        return to_nearest

    with open_checkpoint(tiny.write_folder(tmp_path / "checkpoint", SHAPES[shape])) as checkpoint:
        architecture = architecture_for(checkpoint.config)
        fitted = RECIPES[recipe].fitted(architecture.hidden_size, is_calibrated=True)
        value = Float32() if fitted.layer.splits_values else None
        exact = replace(RECIPES["fp32"], layer=replace(RECIPES["fp32"].layer, value=value))
        with DataFile(tmp_path) as file:
            graph = GraphBuilder(Weights(checkpoint, exact, file, lambda _: None), observe=note)
            architecture.build(graph, CONTEXT)
        (tmp_path / "layer").mkdir()
        original = Original(checkpoint, architecture, fitted, CONTEXT)
        reference = Reference(original, tmp_path / "layer", WINDOWS)
        kinds = set()
        for name, cut, x in places:
            if name == "lm_head":
                assert reference.lack(name, cut) is None
                continue
            lack = reference.lack(name, cut)
            assert lack is not None
            kinds.add(lack.is_of_inputs)
            weights = _weights(graph, name)
            for number, window in enumerate(WINDOWS):
                inputs = between(graph.model("whole"), tmp_path, graph.input_ids, x)(window)[0]
                off = 0.1 * rng.standard_normal(inputs.shape, np.float32)
                expected = -off if lack.is_of_inputs else -off @ weights.T
                assert lack.width == expected.shape[1]
                size = float(np.abs(expected).max())
                np.testing.assert_allclose(
                    lack.of(number, inputs + off), expected, rtol=0, atol=2e-4 * size, err_msg=name
                )
    assert kinds == {True, False}


def test_the_disk_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    config = tiny.qwen2_config(num_hidden_layers=4)
    with open_checkpoint(tiny.write_folder(tmp_path / "checkpoint", config)) as checkpoint:
        original = Original(checkpoint, architecture_for(checkpoint.config), RECIPES["balanced"], CONTEXT)
        (tmp_path / "layer").mkdir()
        reference, sizes = Reference(original, tmp_path / "layer", WINDOWS), []
        for index in range(4):
            assert reference.lack(f"model.layers.{index}.mlp.down_proj", f"middle.{index}") is not None
            [path] = (tmp_path / "layer").iterdir()
            sizes.append(path.stat().st_size)
    assert len(set(sizes)) == 1


def _weights(graph: GraphBuilder, name: str) -> Any:
    value = graph.model("whole").graph.initializers[name].const_value
    assert value is not None
    return value.numpy()
