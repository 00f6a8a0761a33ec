"""The published configs: each becomes a graph of the right size, from the header of a checkpoint without weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edge.bundle import KVLayout, StateLayout
from export.architectures import architecture_for
from export.checkpoint import Checkpoint, open_checkpoint
from export.graph import GraphBuilder
from export.mtp import multi_token_prediction
from export.quantize.blockwise import quantize_rows, split_forms
from export.quantize.recipes import RECIPES, Blockwise, Float32, Format
from export.weights import Change, DataFile, Matrix, Rounding, Split, Weights
from tests.export import tiny

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
PARAMETERS = {
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen2.5-Coder-0.5B-Instruct": 494_032_768,
    "Qwen2.5-Coder-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-Coder-3B-Instruct": 3_085_938_688,
    "Qwen2.5-Coder-7B-Instruct": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen3-4B-Thinking-2507": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3.5-0.8B": 752_393_024,
    "Qwen3.5-2B": 1_881_825_088,
    "Qwen3.5-4B": 4_205_751_296,
    "Qwen3.5-9B": 8_953_803_264,
}
"""Of the text, by the published shapes of the tensors."""
MTP_PARAMETERS = {
    "Qwen3.5-0.8B": 20_452_864,
    "Qwen3.5-2B": 60_828_160,
    "Qwen3.5-4B": 120_599_552,
    "Qwen3.5-9B": 243_290_624,
}
_STATE = {"conv_kernel": 3, "key_dim": 128, "value_dim": 128}
SMALL = StateLayout(layers=18, conv_channels=6144, value_heads=16, **_STATE)
LARGE = StateLayout(layers=24, conv_channels=8192, value_heads=32, **_STATE)
LAYOUTS = {
    "Qwen3.5-0.8B": (KVLayout(layers=6, kv_heads=2, head_dim=256), SMALL),
    "Qwen3.5-2B": (KVLayout(layers=6, kv_heads=2, head_dim=256), SMALL),
    "Qwen3.5-4B": (KVLayout(layers=8, kv_heads=4, head_dim=256), LARGE),
    "Qwen3.5-9B": (KVLayout(layers=8, kv_heads=4, head_dim=256), LARGE),
}
CONTEXT = 1024


class UnreadWeights(Weights):
    """Initializers of the right types and shapes, from headers alone; no number is read."""

    def vector(self, name: str, sources: Sequence[str], change: Change | None = None) -> ir.Value:
        del change
        self._count(sources)
        first, *rest = self.shape(sources[0])
        rows = sum(self.shape(source)[0] for source in sources)
        assert first <= rows
        return self.file.initializer(name, ir.DataType.FLOAT, [rows, *rest], 0)

    def matrix(self, name: str, sources: Sequence[str], form: Format, rounding: Rounding = quantize_rows) -> Matrix:
        del rounding
        self._count(sources)
        rows, columns = self._stacked_shape(sources)
        if isinstance(form, Float32):
            value = self.file.initializer(name, ir.DataType.FLOAT, [rows, columns], 0)
            return Matrix(rows, columns, form, (value,), rows * columns * 4)
        return self._quantized(name, rows, columns, form.fit(columns))

    def _quantized(self, name: str, rows: int, columns: int, form: Blockwise) -> Matrix:
        blocks = -(-columns // form.block)
        shapes = {
            "codes": (ir.DataType.UINT8, [rows, blocks, form.block * form.bits // 8]),
            "scales": (ir.DataType.FLOAT16, [rows, blocks]),
            "zero_points": (ir.DataType.UINT8, [rows, -(-blocks * form.bits // 8)]),
        }
        if form.symmetric:
            del shapes["zero_points"]
        parts = [self.file.initializer(f"{name}.{part}", dtype, shape, 0) for part, (dtype, shape) in shapes.items()]
        return Matrix(
            rows, columns, form, tuple(parts), sum(int(part.const_value.nbytes) for part in parts if part.const_value)
        )

    def values(self, source: str) -> NDArray[np.float32]:
        return np.zeros(self.shape(source), np.float32)

    def split(self, name: str, source: str, form: Blockwise, corrected: NDArray[np.int64] | None) -> Split:
        copy, rest = split_forms(form)
        upper = self.matrix(f"{name}.upper", [source], copy)
        lower = self.matrix(f"{name}.lower", [source], rest)
        correction = None
        if corrected is not None:
            shape = (upper.rows, len(corrected))
            correction = self._quantized(f"{name}.correction", *shape, Blockwise(4, 32, symmetric=True))
            correction = replace(correction, order=corrected)
        lower = replace(lower, parts=(lower.parts[0], upper.parts[1]))
        return Split(upper, lower, correction, 2**rest.bits)

    def _count(self, sources: Sequence[str]) -> None:
        self.parameter_count += sum(math.prod(self.shape(each)) for each in set(sources) - self._counted)
        self._counted.update(sources)


@pytest.fixture(params=PARAMETERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write_header(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint in bfloat16 whose weights are a hole in its file."""
    folder.mkdir()
    header, offset = {}, 0
    for tensor, shape in tiny.shapes(config).items():
        stop = offset + 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(file.tell() + offset)
    tiny.write_json(folder / "config.json", config)
    (folder / "tokenizer.json").write_bytes(tiny.tokenizer_for(config))
    return folder


def open_published(name: str, folder: Path) -> Checkpoint:
    config = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    return open_checkpoint(write_header(folder, config))


def test_no_config_is_left_out() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == PARAMETERS.keys()


@pytest.mark.parametrize("recipe", ["balanced", "fp32"])
def test_a_graph_of_the_right_size(name: str, recipe: str, tmp_path: Path) -> None:
    with open_published(name, tmp_path / "m") as checkpoint, DataFile(tmp_path) as file:
        architecture = architecture_for(checkpoint.config)
        architecture.check({tensor: info.shape for tensor, info in checkpoint.tensors.items()})
        weights = UnreadWeights(checkpoint, RECIPES[recipe], file, lambda _: None)
        graph = GraphBuilder(weights)
        bytes_per_token = architecture.build(graph, CONTEXT).bytes_per_token
        model = graph.model(name)
    assert architecture.parameter_count() == weights.parameter_count == PARAMETERS[name]
    own = {tensor: info.shape for tensor, info in checkpoint.tensors.items() if not tensor.startswith("mtp.")}
    matrices = sum(math.prod(shape) for shape in own.values() if len(shape) == 2)
    table = math.prod(checkpoint.tensors["model.embed_tokens.weight"].shape)
    if recipe == "fp32":
        # Every matrix once; an untied embedding not at all.
        assert bytes_per_token == 4 * (matrices - (0 if architecture.tied else table))
    pasts = [value for value in model.graph.inputs if str(value.name).startswith("past")]
    assert len(pasts) == 2 * architecture.num_layers
    layouts = LAYOUTS.get(name, (None, None))
    if layouts[0]:
        assert (architecture.kv_layout(), architecture.state_layout()) == layouts
        kinds = Counter(node.op_type for node in model.graph)
        assert kinds["GroupQueryAttention"] == layouts[0].layers
        assert kinds["LinearAttention"] == kinds["CausalConvWithState"] == architecture.state_layout().layers
    else:
        assert architecture.state_layout() is None


def test_a_sequence_takes_as_much_state_however_long_it_is() -> None:
    """18 or 24 layers of 16 or 32 matrices of 128 by 128, and three positions of a convolution, in float32."""
    assert SMALL.bytes_per_slot == 20_201_472
    assert LARGE.bytes_per_slot == 52_690_944


@pytest.mark.parametrize("name", MTP_PARAMETERS)
def test_a_head_of_multi_token_prediction_of_the_right_size(name: str, tmp_path: Path) -> None:
    with open_published(name, tmp_path / "m") as checkpoint, DataFile(tmp_path) as file:
        assert checkpoint.notes == ("only the text part is exported: 2 tensors of vision are skipped",)
        head, recipe = multi_token_prediction(checkpoint), RECIPES["fp32"]
        main = architecture_for(checkpoint.config).build(
            GraphBuilder(UnreadWeights(checkpoint, recipe, file, lambda _: None)), CONTEXT
        )
        weights = UnreadWeights(checkpoint, recipe, file, lambda _: None)
        graph = GraphBuilder(weights)
        bytes_per_token = head.build(graph, main, CONTEXT)
    assert head.parameter_count() == weights.parameter_count == MTP_PARAMETERS[name]
    shapes = [info.shape for tensor, info in checkpoint.tensors.items() if tensor.startswith("mtp.")]
    table = math.prod(checkpoint.tensors["model.embed_tokens.weight"].shape)
    assert bytes_per_token == 4 * (sum(math.prod(shape) for shape in shapes if len(shape) == 2) + table)
    assert len([value for value in graph.model(name).graph.inputs if str(value.name).startswith("past")]) == 2
    assert head.kv_layout() == LAYOUTS[name][0].model_copy(update={"layers": 1})
