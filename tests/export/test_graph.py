"""Architectures and graph: the sizes of every family, what a checkpoint must hold, and what the graph computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edge.bundle import GRAPH
from edge.errors import CheckpointError
from export.architectures import architecture_for
from export.build import Graph, build_graph
from export.checkpoint import open_checkpoint
from export.oracle import Decoder
from export.progress import Silent
from export.quantize.recipes import RECIPES, Blockwise, Recipe
from tests.export import tiny, tiny_qwen3_5
from tests.oracle import golden

SCHEDULES: dict[str, list[int]] = {"prefill": [24], "decode": [10, *[1] * 14], "chunked": [7, 7, 7, 3]}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-tied": tiny.qwen2_config(),
    "qwen2-untied": tiny.qwen2_config(tie_word_embeddings=False, num_key_value_heads=1),
    "qwen3-tied": tiny.qwen3_config(num_key_value_heads=4),
    "qwen3-untied": tiny.qwen3_config(tie_word_embeddings=False),
    # 3 blocks of 32 in a row, and rows that end within a block.
    "qwen2-odd-blocks": tiny.qwen2_config(hidden_size=96, num_attention_heads=6, num_key_value_heads=3),
    "qwen3-ragged": tiny.qwen3_config(intermediate_size=100),
    "qwen3_5": tiny_qwen3_5.config(),
    "qwen3_5-grouped": tiny_qwen3_5.config(linear_num_value_heads=4, tie_word_embeddings=False),
}


def build(
    folder: Path, config: dict[str, Any], recipe: Recipe, *, seed: int = 0, context: int | None = None
) -> tuple[Graph, Path]:
    """The graph of a tiny checkpoint, and the folder it stands in."""
    folder.mkdir()
    with open_checkpoint(tiny.write_folder(folder / "checkpoint", config, seed=seed)) as checkpoint:
        return build_graph(checkpoint, folder, recipe, progress=Silent(), context=context), folder


def logits(folder: Path, ids: NDArray[np.int64], sizes: Sequence[int]) -> NDArray[np.float32]:
    """Logits [n, padded_vocab] of all tokens, fed in pieces."""
    decoder = Decoder(folder)
    starts = np.cumsum([0, *sizes])
    assert starts[-1] == len(ids)
    return np.concatenate([decoder.append(ids[start:stop]) for start, stop in pairwise(starts)])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", golden.CASES)
def test_the_fp32_graph_computes_what_transformers_does(case: str, schedule: str, tmp_path: Path) -> None:
    _, folder = build(tmp_path / "graph", golden.CASES[case], RECIPES["fp32"], seed=golden.SEED)
    found = logits(folder, golden.prompt(), SCHEDULES[schedule])
    np.testing.assert_allclose(found[:, :: golden.EVERY], golden.read(case), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [*((shape, "balanced") for shape in SHAPES), ("qwen2-tied", "small"), ("qwen3-untied", "small")],
)
def test_a_quantized_graph_is_the_fp32_graph_of_its_dequantized_weights(
    shape: str, recipe: str, tmp_path: Path
) -> None:
    exact = replace(RECIPES[recipe], accuracy_level=0)
    quantized = build(tmp_path / "quantized", SHAPES[shape], exact)
    reference = build(tmp_path / "reference", SHAPES[shape], replace(exact, dequantize=True))
    for sizes in SCHEDULES.values():
        expected = logits(reference[1], golden.prompt(), sizes)
        found = logits(quantized[1], golden.prompt(), sizes)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shape", ["qwen2-tied", "qwen3_5"])
def test_a_core_without_dot_products_gets_no_product_in_8_bits(shape: str, tmp_path: Path) -> None:
    graph, _ = build(tmp_path / "graph", SHAPES[shape], RECIPES["nodot"])
    products = [node for node in graph.model.graph if node.op_type == "MatMulNBits"]
    assert len(products) > 4
    assert {node.attributes["bits"].as_int() for node in products} == {4}


def test_values_may_have_a_format_of_their_own(tmp_path: Path) -> None:
    graph, _ = build(tmp_path / "graph", SHAPES["qwen2-tied"], RECIPES["small"])
    products = [node for node in graph.model.graph if node.op_type == "MatMulNBits" and "attn" in str(node.inputs[1])]
    found = {(str(node.inputs[1]).split(".")[4], node.attributes["bits"].as_int()) for node in products}
    assert found == {("qk_proj", 4), ("v_proj", 8), ("o_proj", 4)}


@pytest.mark.parametrize(("recipe", "bound"), [("balanced", 0.5), ("quality", 0.07)])
def test_quantization_and_int8_activations_stay_near_the_original(recipe: str, bound: float, tmp_path: Path) -> None:
    """Loose, because random weights amplify every error; a swapped nibble or scale is far outside."""
    config = tiny.qwen2_config(hidden_size=256, intermediate_size=512)
    expected = logits(build(tmp_path / "fp32", config, RECIPES["fp32"])[1], golden.prompt(), [24])
    found = logits(build(tmp_path / recipe, config, RECIPES[recipe])[1], golden.prompt(), [24])
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < bound


def test_logits_are_computed_for_the_positions_asked_for_and_no_other(tmp_path: Path) -> None:
    _, folder = build(tmp_path / "graph", tiny.qwen2_config(), RECIPES["fp32"])
    ids, whole = golden.prompt(), logits(folder, golden.prompt(), [24])
    decoder = Decoder(folder)
    session, empty = decoder._session, decoder._memory
    lengths = {"seqlens_k": np.array([23], np.int32), "total_sequence_length": np.array(24, np.int32)}
    feeds = {"input_ids": ids[None], **lengths, **empty}
    wanted = np.array([23, 4, 4], np.int64)
    found = session.run(["logits"], {**feeds, "logits_indices": wanted})[0]
    np.testing.assert_allclose(found, whole[wanted], atol=1e-5)


@pytest.mark.parametrize("shape", ["qwen2-tied", "qwen3-untied"])
def test_the_saved_graph_keeps_the_contract_with_the_runtime(shape: str, tmp_path: Path) -> None:
    graph, folder = build(tmp_path / "graph", SHAPES[shape], RECIPES["balanced"])
    saved = ir.load(folder / GRAPH).graph
    kv = graph.architecture.kv_layout()
    cache = f"[batch,{kv.kv_heads},max_length,{kv.head_dim}]"
    parts = [f"{layer}.{kind}" for layer in range(kv.layers) for kind in ("key", "value")]
    expected = {
        "input_ids": "INT64[batch,sequence]",
        "seqlens_k": "INT32[batch]",
        "total_sequence_length": "INT32[]",
        "logits_indices": "INT64[positions]",
        **{f"past_key_values.{part}": f"FLOAT{cache}" for part in parts},
    }
    assert {value.name: f"{value.dtype}{value.shape}" for value in saved.inputs} == expected
    outputs = {
        "logits": "FLOAT[positions,288]",
        "hidden_states": "FLOAT[batch,sequence,64]",
        **{f"present.{part}": f"FLOAT{cache}" for part in parts},
    }
    assert {value.name: f"{value.dtype}{value.shape}" for value in saved.outputs} == outputs


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tied_table_stands_once_on_disk(recipe: str, tmp_path: Path) -> None:
    config = tiny.qwen2_config(vocab_size=8192)
    _, tied = build(tmp_path / "tied", config, RECIPES[recipe])
    _, untied = build(tmp_path / "untied", {**config, "tie_word_embeddings": False}, RECIPES[recipe])
    form = RECIPES[recipe].table
    bits = form.bits if isinstance(form, Blockwise) else 32
    saved = (untied / "model.onnx.data").stat().st_size - (tied / "model.onnx.data").stat().st_size
    assert 8192 * 64 * bits / 8 <= saved < 8192 * 64 * bits / 8 * 1.2
    # In two stages the upper bits are multiplied with, and rows of both parts are looked up.
    is_split = RECIPES[recipe].head is not None
    assert _uses_of_tables(tied, bits) == ([2, 3] if is_split else [2])
    assert _uses_of_tables(untied, bits) == ([1, 1, 1, 2] if is_split else [1, 1])


def _uses_of_tables(folder: Path, bits: int) -> list[int]:
    """How many nodes use each stretch of the file that is a table of so many bits, or its upper 4 bits or the rest."""
    sizes = {8192 * 64 * each // 8 for each in (bits, 4, bits - 4) if each}
    values = [value for node in ir.load(folder / GRAPH).graph for value in node.inputs]
    values = [value for value in values if value is not None and ".correction" not in str(value.name)]
    return sorted(Counter(_place(each) for each in values if _length(each) in sizes).values())


def _length(value: ir.Value | None) -> int:
    tensor = value.const_value if value is not None else None
    return int(tensor.nbytes) if isinstance(tensor, ir.ExternalTensor) else 0


def _place(value: ir.Value | None) -> tuple[str, int | None, int | None]:
    assert value is not None
    assert isinstance(value.const_value, ir.ExternalTensor)
    return str(value.const_value.location), value.const_value.offset, value.const_value.length


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "model type None"),
        (tiny.qwen2_config(model_type="llama"), "'llama' is not supported"),
        (tiny.qwen2_config(model_type=["qwen2"]), "is not supported"),
        (tiny.qwen2_config(use_sliding_window=True), "sliding-window"),
        (tiny.qwen2_config(rope_scaling={"type": "yarn", "factor": 4.0}), "'yarn'"),
        (tiny.qwen2_config(rope_scaling="yarn"), "rope_scaling is 'yarn'"),
        (tiny.qwen2_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "'linear'"),
        (tiny.qwen2_config(rope_parameters=[1]), "rope_parameters is [1]"),
        (tiny.qwen2_config(hidden_act="gelu"), "activation 'gelu'"),
        (tiny.qwen2_config(hidden_size="64"), "hidden_size is '64'"),
        (tiny.qwen2_config(hidden_size=64.0), "hidden_size is 64.0"),
        (tiny.qwen2_config(num_hidden_layers=True), "num_hidden_layers is True"),
        (tiny.qwen2_config(num_hidden_layers=0), "num_hidden_layers is 0"),
        (tiny.qwen2_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        (tiny.qwen2_config(vocab_size=-1), "vocab_size is -1"),
        (tiny.qwen2_config(intermediate_size=None), "intermediate_size is None"),
        (tiny.qwen2_config(num_key_value_heads=3), "4 attention heads"),
        (tiny.qwen3_config(head_dim=24), "head_dim 24"),
        (tiny.qwen2_config(num_attention_heads=128), "head_dim is 0"),
        (tiny.qwen2_config(hidden_size=80, num_attention_heads=5), "5 attention heads"),
        (tiny.qwen2_config(hidden_size=80, head_dim=16), "hidden_size 80"),
        (tiny.qwen2_config(rope_theta="big"), "rope_theta is 'big'"),
        (tiny.qwen2_config(rope_theta=float("nan")), "rope_theta is nan"),
        (tiny.qwen2_config(rms_norm_eps=None), "rms_norm_eps is None"),
        (tiny.qwen2_config(rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
    ],
)
def test_configs_that_cannot_be_exported(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        architecture_for(config)
    assert expected in caught.value.message
    assert caught.value.hint


def test_defaults_of_a_terse_config() -> None:
    config = tiny.qwen2_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, num_key_value_heads=None)
    for key in ("rope_theta", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "use_sliding_window"):
        del config[key]
    found = architecture_for(config)
    assert (found.rope_theta, found.rms_norm_eps, found.tied, found.num_kv_heads) == (5e5, 1e-6, False, 4)


class TestTensors:
    """A checkpoint must hold the tensors of its config, and no others."""

    def found(self, **changes: Any) -> dict[str, tuple[int, ...]]:
        return {name: values.shape for name, values in tiny.random_tensors(tiny.qwen3_config(**changes)).items()}

    def refusal(self, found: dict[str, tuple[int, ...]], **config: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            architecture_for(tiny.qwen3_config(**config)).check(found)
        assert "qwen3 with" in caught.value.hint
        return caught.value.message

    def test_all_there(self) -> None:
        architecture_for(tiny.qwen3_config()).check(self.found())

    def test_missing(self) -> None:
        found = self.found()
        del found["model.layers.1.self_attn.q_norm.weight"]
        assert self.refusal(found) == "the checkpoint lacks model.layers.1.self_attn.q_norm.weight"

    def test_many_missing_are_counted(self) -> None:
        found = {name: shape for name, shape in self.found().items() if ".layers.1." not in name}
        message = self.refusal(found)
        assert message.count("model.layers.1.") == 4
        assert message.endswith("and 7 more")

    def test_left_over(self) -> None:
        found = {**self.found(), "model.layers.0.self_attn.q_proj.bias": (128,)}
        assert "no place in the model: model.layers.0.self_attn.q_proj.bias" in self.refusal(found)

    def test_a_layer_too_many(self) -> None:
        assert "no place in the model: model.layers.2." in self.refusal(self.found(num_hidden_layers=3))

    def test_wrong_shape(self) -> None:
        found = self.found(intermediate_size=128)
        assert "model.layers.0.mlp.down_proj.weight is [64, 128] instead of [64, 96]" in self.refusal(found)

    def test_an_untied_model_needs_its_head(self) -> None:
        assert "lacks lm_head.weight" in self.refusal(self.found(), tie_word_embeddings=False)

    def test_a_tied_model_may_store_its_head_twice_but_not_in_another_shape(self) -> None:
        architecture_for(tiny.qwen3_config()).check({**self.found(), "lm_head.weight": (288, 64)})
        assert "lm_head.weight" in self.refusal({**self.found(), "lm_head.weight": (288, 32)})
