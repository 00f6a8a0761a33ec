"""Graphs for GPUs: what a processor can check of them. What a GPU computes with them is checked in tests/gpu."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from edge.bundle import GRAPH, WEIGHTS, CacheType, Manifest, Target
from edge.errors import ConfigError, ExportError
from export import targets
from export.build import build_graph
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES, Blockwise, Projections, Recipe
from export.targets import fuse_head_norms, to_half
from tests.export import tiny, tiny_qwen3_5

Array = NDArray[Any]
CONFIGS: dict[str, Callable[..., dict[str, Any]]] = {"qwen2": tiny.qwen2_config, "qwen3": tiny.qwen3_config}
IDS = np.random.default_rng(0).integers(0, tiny.NUM_IDS, 24)


def checkpoint_of(folder: Path, config: Mapping[str, Any]) -> Path:
    return tiny.write_folder(folder / "checkpoint", config)


def export(folder: Path, checkpoint: Path, target: Target, recipe: Recipe = RECIPES["quality"]) -> Manifest:
    with open_checkpoint(checkpoint) as opened:
        return export_bundle(opened, folder / target, recipe, target=target, progress=Silent()).manifest


def feeds(session: ort.InferenceSession) -> dict[str, Array]:
    """A prompt in one step."""
    count = len(IDS)
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    caches = {
        value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], dtypes[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    return caches | {
        "input_ids": IDS[None],
        "seqlens_k": np.array([count - 1], np.int32),
        "total_sequence_length": np.array(count, np.int32),
        "logits_indices": np.arange(count),
    }


def run(folder: Path, outputs: tuple[str, ...] = ("logits", "hidden_states")) -> list[Array]:
    session = ort.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    return list(session.run(list(outputs), feeds(session)))


def relative(found: Array, expected: Array) -> float:
    return float(np.abs(found.astype(np.float32) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("recipe", ["fp32", "quality"])
def test_float16_computes_the_same_as_far_as_it_goes(tmp_path: Path, family: str, recipe: str) -> None:
    with open_checkpoint(checkpoint_of(tmp_path, CONFIGS[family]())) as opened:
        (tmp_path / "half").mkdir()
        # Without int8 activations, whose rounding turns the smallest difference into a large one.
        graph = build_graph(opened, tmp_path / "half", replace(RECIPES[recipe], accuracy_level=0), progress=Silent())
    expected, size = run(tmp_path / "half"), (tmp_path / "half" / WEIGHTS).stat().st_size
    to_half(graph.model, tmp_path / "half")
    ir.save(graph.model, tmp_path / "half" / GRAPH)
    found = run(tmp_path / "half")
    for name, each, other in zip(("logits", "hidden_states"), found, expected, strict=True):
        assert each.dtype == np.float32
        assert 0 < relative(each, other) < 0.005, name
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "half"]


def test_nothing_but_the_outputs_is_float32_for_cuda(tmp_path: Path) -> None:
    manifest = export(tmp_path, checkpoint_of(tmp_path, tiny.qwen3_config()), "cuda")
    assert (manifest.target, manifest.kv.dtype) == ("cuda", "float16")
    assert manifest.kv.bytes_per_token == 2 * 2 * manifest.kv.layers * manifest.kv.kv_heads * manifest.kv.head_dim
    assert 0 < manifest.measured["target"]["largest_activation"] < targets.LARGEST_ACTIVATION
    model = onnx.load(tmp_path / "cuda" / GRAPH, load_external_data=False)
    assert {each.data_type for each in model.graph.initializer} == {
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.UINT8,
        onnx.TensorProto.INT64,
        onnx.TensorProto.DOUBLE,  # from which onnxruntime computes rotary tables
    }
    float32 = onnx.TensorProto.FLOAT
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    assert {each.name for each in values if each.type.tensor_type.elem_type == float32} == {"logits", "hidden_states"}


@pytest.mark.parametrize("target", ["cuda", "webgpu"])
@pytest.mark.parametrize("family", CONFIGS)
def test_graphs_pass_the_checker_and_processors_do_not_compute_them(
    tmp_path: Path, family: str, target: Target
) -> None:
    export(tmp_path, checkpoint_of(tmp_path, CONFIGS[family]()), target, RECIPES["balanced"])
    onnx.checker.check_model(tmp_path / target / GRAPH)
    model = onnx.load(tmp_path / target / GRAPH, load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    norms = [node for node in model.graph.node if node.op_type == "RMSNormalization"]
    assert len(norms) == 2 * 2 + 1  # none of heads
    # GPUs refuse to look up others.
    lookups = [node for node in model.graph.node if node.op_type == "GatherBlockQuantized"]
    assert {each.i for node in lookups for each in node.attribute if each.name == "bits"} == {4}
    if family == "qwen3":
        with pytest.raises(Exception, match="q_norm_weight"):
            run(tmp_path / target)


def test_fused_norms_are_the_norms_that_stood_before_attention(tmp_path: Path) -> None:
    """Attention as its specification says it, in numpy, over the fused graph's own inputs."""
    config = tiny.qwen3_config()
    checkpoint = checkpoint_of(tmp_path, config)
    export(tmp_path, checkpoint, "cpu", RECIPES["fp32"])
    plain = ir.load(tmp_path / "cpu" / GRAPH)
    fused = ir.load(tmp_path / "cpu" / GRAPH)
    fuse_head_norms(fused)
    for index, (before, after) in enumerate(zip(_attentions(plain), _attentions(fused), strict=True)):
        wanted = [str(before.outputs[0].name), *(str(each.name) for each in after.inputs[:3] if each is not None)]
        attended, *qkv = _values(plain, tmp_path / "cpu", wanted)
        weights = [each.const_value.numpy() for each in after.inputs[14:16] if each and each.const_value]
        epsilon = after.attributes["qk_norm_epsilon"].as_float()
        query, key = (_rotated(_norm(_heads(x), w, epsilon), config) for x, w in zip(qkv[:2], weights, strict=True))
        np.testing.assert_allclose(_attend(query, key, _heads(qkv[2])), attended[0], atol=1e-5)
        assert len(weights) == 2, index


def test_tables_with_an_odd_number_of_4_bit_blocks(tmp_path: Path) -> None:
    """For WebGPU they are uint4; a processor looks up the same values in both."""
    table = Recipe("x", Projections.all(Blockwise(bits=8, block=32)), Blockwise(bits=4, block=32), accuracy_level=0)
    checkpoint = checkpoint_of(tmp_path, tiny.qwen2_config(hidden_size=96, num_attention_heads=2, head_dim=48))
    export(tmp_path, checkpoint, "cpu", table)
    export(tmp_path, checkpoint, "webgpu", table)
    model = onnx.load(tmp_path / "webgpu" / GRAPH, load_external_data=False)
    types = {each.name: each.data_type for each in model.graph.initializer}
    lookups = [node for node in model.graph.node if node.op_type == "GatherBlockQuantized"]
    assert lookups
    for node in lookups:
        assert types[node.input[0]] == types[node.input[3]] == onnx.TensorProto.UINT4
    for found, expected in zip(run(tmp_path / "webgpu"), run(tmp_path / "cpu"), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("kv", "config", "reason"),
    [("int8", tiny.qwen2_config(), "int8 cache"), ("float32", tiny_qwen3_5.config(), "linear attention")],
)
def test_what_no_gpu_gets_is_refused_before_any_work(
    tmp_path: Path, kv: CacheType, config: dict[str, Any], reason: str
) -> None:
    with open_checkpoint(checkpoint_of(tmp_path, config)) as opened:
        with pytest.raises(ConfigError, match=reason):
            export_bundle(opened, tmp_path / "b", RECIPES["fp32"], kv=kv, target="cuda", progress=Silent())
        with pytest.raises(ConfigError, match="adapters"):
            export_bundle(
                opened, tmp_path / "b", RECIPES["fp32"], target="webgpu", adapters={"a": tmp_path}, progress=Silent()
            )
    assert not (tmp_path / "b").exists()


def test_activations_that_float16_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(tmp_path, tiny.qwen2_config())
    monkeypatch.setattr(targets, "LARGEST_ACTIVATION", 0.5)
    with pytest.raises(ExportError, match="leaves float16 no room"):
        export(tmp_path, checkpoint, "cuda")
    assert not (tmp_path / "cuda").exists()
    assert export(tmp_path, checkpoint, "webgpu").target == "webgpu"


def test_weights_that_float16_cannot_hold(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, tiny.qwen2_config())
    tensors = tiny.random_tensors(tiny.qwen2_config())
    tensors["model.norm.weight"][3] = 1e5
    tiny.write_safetensors(checkpoint / "model.safetensors", tensors)
    with pytest.raises(ExportError, match=r"model\.norm\.weight holds numbers beyond float16"):
        export(tmp_path, checkpoint, "cuda", RECIPES["fp32"])


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def _values(model: ir.Model, folder: Path, names: list[str]) -> list[Array]:
    """Values inside a graph, for the prompt."""
    proto = ir.to_proto(model)
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    path = folder / "inside.onnx"
    path.write_bytes(proto.SerializeToString())
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(names, feeds(session)))


def _heads(x: Array) -> Array:
    """[1, tokens, heads * 32] -> [heads, tokens, 32]."""
    return np.moveaxis(x[0].reshape(x.shape[1], -1, 32), 1, 0)


def _norm(x: Array, weight: Array, epsilon: float) -> Array:
    result: Array = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + epsilon) * weight
    return result


def _rotated(x: Array, config: Mapping[str, Any]) -> Array:
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), config["rope_theta"] ** (-np.arange(half) / half))
    cos, sin, first, second = np.cos(angles), np.sin(angles), x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attend(query: Array, key: Array, value: Array) -> Array:
    """Causal attention of heads that share keys; [tokens, heads * 32]."""
    shared = len(query) // len(key)
    key, value = (np.repeat(each, shared, axis=0) for each in (key, value))
    scores = query @ np.swapaxes(key, 1, 2) / np.sqrt(query.shape[-1])
    scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attended = weights / weights.sum(axis=-1, keepdims=True) @ value
    result: Array = np.moveaxis(attended, 0, 1).reshape(query.shape[1], -1)
    return result
