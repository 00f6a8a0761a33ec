"""The int8 cache: its scales, the graph that uses them, and that calibration takes one layer at a time."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge.bundle import GRAPH, KVLayout, verify_bundle
from edge.errors import ExportError
from export.build import Graph, build_graph
from export.calibration import BUILT_IN, CalibrationText
from export.checkpoint import open_checkpoint
from export.kv_scales import (
    WINDOW,
    CacheTest,
    Calibration,
    cache_test,
    calibrate,
    divergence,
    key_reach,
    quantize_cache,
)
from export.oracle import Decoder
from export.pipeline import Report, export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.export import tiny, tiny_qwen3_5

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": tiny.qwen2_config(),
    "qwen3-untied": tiny.qwen3_config(tie_word_embeddings=False, num_key_value_heads=1),
    "qwen3_5": tiny_qwen3_5.config(num_key_value_heads=1),
}
PROMPT = "hello world, hello hello"
NUM_DECODED = 24


def text_ids() -> list[int]:
    return list(Tokenizer.from_buffer(tiny.tokenizer_json()).encode(CalibrationText.open(BUILT_IN).text).ids)


def build(folder: Path, config: dict[str, Any], recipe: str = "fp32", context: int | None = None) -> Graph:
    with open_checkpoint(tiny.write_folder(folder / "checkpoint", config)) as checkpoint:
        return build_graph(checkpoint, folder, RECIPES[recipe], progress=Silent(), context=context)


def with_int8_cache(folder: Path, config: dict[str, Any], recipe: str = "fp32") -> tuple[Calibration, CacheTest]:
    """A graph with an int8 cache in ``folder``."""
    graph = build(folder, config, recipe)
    calibration = calibrate(graph.model, folder, text_ids())
    quantize_cache(graph.model, calibration.scales)
    ir.save(graph.model, folder / GRAPH)
    return calibration, cache_test(graph.model, folder, text_ids(), calibration)


def export(source: Path, output: Path, **options: Any) -> Report:
    with open_checkpoint(source) as checkpoint:
        return export_bundle(checkpoint, output, RECIPES["balanced"], progress=Silent(), kv="int8", **options)


def cached(decoder: Decoder, name: str) -> NDArray[Any]:
    return decoder._memory[f"past_key_values.{name}"]


class TestScales:
    def test_a_key_reaches_what_its_pair_turns_into(self) -> None:
        """Head width 4: channels 0 and 2 turn together, and 1 and 3."""
        keys = np.array([[3, 1, -4, 0], [-1, 0, 2, -2]], np.float32)[None, None]
        at_rest = key_reach(keys, np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32))
        np.testing.assert_allclose(at_rest[0, 0], [3, 1, 4, 2])
        # The first pair by a quarter turn, by the rotary convention (x, y) -> (-y, x); the second rests.
        cos, sin = np.array([[0, 1]], np.float32), np.array([[1, 0]], np.float32)
        np.testing.assert_allclose(key_reach(keys, cos, sin)[0, 0], [4, 1, 4, 2])
        # (3, -4) turned onto the first axis.
        cos, sin = np.array([[0.6, 1]], np.float32), np.array([[0.8, 0]], np.float32)
        np.testing.assert_allclose(key_reach(keys, cos, sin)[0, 0], [5, 1, 4, 2])

    def test_the_largest_value_of_a_channel_leaves_a_fifth_of_its_codes(self, tmp_path: Path) -> None:
        config, ids = SHAPES["qwen2"], text_ids()[:200]
        calibration = calibrate(build(tmp_path, config).model, tmp_path, ids)
        reference = Decoder(tmp_path)
        reference.append(np.array(ids, np.int64))
        for layer, scales in enumerate(calibration.scales):
            assert scales.key.shape == scales.value.shape == (1, 2, 1, 16)
            values = np.abs(cached(reference, f"{layer}.value")).max(axis=2, keepdims=True)
            np.testing.assert_allclose(scales.value * 127, values * 1.25, rtol=1e-5)
            keys = np.abs(cached(reference, f"{layer}.key")).max(axis=2, keepdims=True)
            assert (scales.key * 127 >= keys * 1.24999).all()
            # Pairs turn into each other: a channel reaches at most the length of its pair.
            pair = np.sqrt(keys[..., :8] ** 2 + keys[..., 8:] ** 2)
            assert (scales.key * 127 <= np.concatenate([pair, pair], axis=-1) * 1.25001).all()

    def test_silent_channels_have_a_scale_all_the_same(self, tmp_path: Path) -> None:
        """Else a division by zero would fill the cache."""
        config = tiny.qwen2_config()
        folder = tiny.write_folder(tmp_path / "source", config)
        tensors = tiny.random_tensors(config)
        for part in "kv":
            tensors[f"model.layers.0.self_attn.{part}_proj.weight"][:] = 0
            tensors[f"model.layers.0.self_attn.{part}_proj.bias"][:] = 0
        tensors["model.layers.1.self_attn.v_proj.weight"][3] = 0
        tensors["model.layers.1.self_attn.v_proj.bias"][3] = 0
        tiny.write_safetensors(folder / "model.safetensors", tensors, "F32")
        assert export(folder, tmp_path / "bundle").manifest.measured["kv"]["kl"] < 0.01
        with open_checkpoint(folder) as checkpoint:
            graph = build_graph(checkpoint, tmp_path, RECIPES["fp32"], progress=Silent())
        first, second = calibrate(graph.model, tmp_path, text_ids()[:64]).scales
        np.testing.assert_allclose(first.key, 1.25e-3 / 127, rtol=1e-5)
        assert second.value[0, 0, 0, 3] == pytest.approx(second.value.max() * 1e-3)

    def test_windows_are_no_longer_than_the_context(self, tmp_path: Path) -> None:
        graph = build(tmp_path, SHAPES["qwen2"], context=40)
        # 40 positions and one to fill up, in a table of eights.
        assert len(calibrate(graph.model, tmp_path, text_ids()).hidden) == 4 * 48 // 32

    def test_the_text_reaches_into_the_last_window(self) -> None:
        """The tokenizers of these models make a token of three bytes of it."""
        assert len(CalibrationText.open(BUILT_IN).text.encode()) > 3 * 3 * WINDOW
        assert not CalibrationText.open(BUILT_IN).text.isascii()


class TestGraph:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_cache_holds_the_rounded_keys_and_values(self, shape: str, tmp_path: Path) -> None:
        config, ids = SHAPES[shape], np.array(text_ids()[1000:1100], np.int64)
        build(tmp_path, config)
        before = Decoder(tmp_path)
        before.append(ids)
        calibration, _ = with_int8_cache(tmp_path / "int8", config)
        after = Decoder(tmp_path / "int8")
        after.append(ids)
        # Only the first cache is of the same inputs in both.
        for kind, scale in (("key", calibration.scales[0].key), ("value", calibration.scales[0].value)):
            codes = np.clip(np.rint(cached(before, f"0.{kind}") / scale), -128, 127)
            difference = np.abs(cached(after, f"0.{kind}") - codes)
            assert difference.max() <= 1
            assert (difference == 0).mean() > 0.999

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("recipe", ["fp32", "balanced"])
    def test_decoding_stays_near_the_float32_cache(self, shape: str, recipe: str, tmp_path: Path) -> None:
        config = SHAPES[shape]
        build(tmp_path, config, recipe)
        _, tested = with_int8_cache(tmp_path / "int8", config, recipe)
        exact, stored = Decoder(tmp_path), Decoder(tmp_path / "int8")
        ids = Tokenizer.from_buffer(tiny.tokenizer_json()).encode(PROMPT).ids
        same = 0
        for _ in range(NUM_DECODED):
            expected, found = (each.append(np.array(ids, np.int64))[-1] for each in (exact, stored))
            assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
            same += found.argmax() == expected.argmax()
            ids = [int(expected.argmax())]
        assert same >= NUM_DECODED - 2
        assert 0 < tested.kl < 0.01
        assert tested.top1 > 0.85
        assert 0.001 < tested.error < 0.02

    def test_a_wrong_scale_shows_in_the_test(self, tmp_path: Path) -> None:
        graph = build(tmp_path, SHAPES["qwen2"])
        calibration = calibrate(graph.model, tmp_path, text_ids())
        for scales in calibration.scales:
            scales.value[:] = scales.value[..., ::-1] / 10
        quantize_cache(graph.model, calibration.scales)
        assert cache_test(graph.model, tmp_path, text_ids(), calibration).kl > 0.1

    def test_the_saved_graph_keeps_the_contract_with_the_runtime(self, tmp_path: Path) -> None:
        with_int8_cache(tmp_path, SHAPES["qwen2"], "balanced")
        saved = ir.load(tmp_path / GRAPH).graph
        caches = [value for value in (*saved.inputs, *saved.outputs) if str(value.name).endswith((".key", ".value"))]
        assert {f"{value.dtype}{value.shape}" for value in caches} == {"INT8[batch,2,max_length,16]"}
        assert len(caches) == 2 * 2 * 2

    def test_no_more_than_a_layer_is_loaded_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What keeps the export of a large model within the memory of a small machine."""
        graph = build(tmp_path, tiny.qwen2_config(num_hidden_layers=5), "balanced")
        loaded: list[set[bytes]] = []
        session = ort.InferenceSession

        def watched(model: bytes, *args: Any) -> Any:
            loaded.append(set(re.findall(rb"layers\.\d+\.", model)))
            return session(model, *args)

        monkeypatch.setattr(ort, "InferenceSession", watched)
        calibration = calibrate(graph.model, tmp_path, text_ids())
        quantize_cache(graph.model, calibration.scales)
        cache_test(graph.model, tmp_path, text_ids(), calibration)
        assert max(map(len, loaded)) == 1
        assert sum(map(len, loaded)) == 2 * 5


class TestBundle:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return tiny.write_folder(tmp_path / "Tiny", tiny.qwen2_config())

    def test_the_manifest_says_it(self, source: Path, tmp_path: Path) -> None:
        report = export(source, tmp_path / "bundle")
        manifest = verify_bundle(tmp_path / "bundle")
        assert manifest == report.manifest
        assert manifest.kv == KVLayout(layers=2, kv_heads=2, head_dim=16, dtype="int8")
        assert manifest.kv.bytes_per_token == 2 * 2 * 2 * 16
        assert manifest.measured["kv"].keys() == {"positions", "kl", "top1", "error"}
        assert manifest.measured["self_test"]["chunked_difference"] < 0.05
        assert list(report.seconds) == ["quantize", "calibrate", "verify", "hash"]
        assert report.seconds["calibrate"] > 0

    def test_two_exports_are_byte_identical(self, source: Path, tmp_path: Path) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        export(source, first)
        export(source, second)
        files = [path.name for path in first.iterdir()]
        assert [(first / name).read_bytes() for name in files] == [(second / name).read_bytes() for name in files]

    def test_the_weights_are_those_of_the_float32_cache(self, source: Path, tmp_path: Path) -> None:
        export(source, tmp_path / "int8")
        with open_checkpoint(source) as checkpoint:
            export_bundle(checkpoint, tmp_path / "float32", RECIPES["balanced"], progress=Silent())
        weights = [(tmp_path / kv / "model.onnx.data").read_bytes() for kv in ("int8", "float32")]
        assert weights[0] == weights[1]
        manifest = json.loads((tmp_path / "float32" / "manifest.json").read_text())
        assert manifest["kv"]["dtype"] == "float32"
        assert "kv" not in manifest["measured"]

    def test_activations_that_overflow(self, source: Path, tmp_path: Path) -> None:
        tensors = tiny.random_tensors(tiny.qwen2_config())
        tensors["model.layers.1.input_layernorm.weight"][:] = 3e38
        tiny.write_safetensors(source / "model.safetensors", tensors, "F32")
        with pytest.raises(ExportError, match="self-test: layer 1 is not finite"):
            export(source, tmp_path / "out" / "bundle")
        assert list((tmp_path / "out").iterdir()) == []


def test_divergence_of_distributions_known_by_heart() -> None:
    """Shifted logits are the same distribution; a fair coin against one that falls on its head nine times in ten."""
    expected = np.array([[0, 0], [1, 2], [1e4, 0]], np.float32)
    found = np.array([[math.log(9), 0], [-4, -3], [1e4, 0]], np.float32)
    coin = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    np.testing.assert_allclose(divergence(expected, found), [coin, 0, 0], atol=1e-6)
