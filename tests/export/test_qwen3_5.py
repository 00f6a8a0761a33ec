"""Qwen3.5: what its graph computes against transformers 5, and its checkpoints end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import edge.cli
from edge.adapter import AdapterConfig
from edge.bundle import (
    CHAT_TEMPLATE,
    GENERATION,
    GRAPH,
    TOKENIZER,
    WEIGHTS,
    KVLayout,
    StateLayout,
    verify_bundle,
)
from edge.chat import ChatTemplate
from edge.engine.lora import Places
from edge.errors import CheckpointError, ConfigError
from export.architectures import architecture_for
from export.build import Graph, build_graph
from export.checkpoint import open_checkpoint
from export.graph import present_name
from export.oracle import Decoder, Oracle, verify_against, write_folder
from export.pipeline import Report, export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES, Recipe
from export.segments import lengths
from export.text_part import text_config, text_tensors
from tests.export import peft, tiny, tiny_qwen3_5
from tests.oracle import golden_qwen3_5 as golden

TOLERANCE = 5e-4
"""Absolute, for a logit; the largest are about 3."""
TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates" / "qwen3.5"
OPEN, CLOSED = "<think>\n", "<think>\n\n</think>\n\n"
SCHEDULES: dict[str, list[int]] = {"prefill": [72], "decode": [1] * 72, "chunked": [7, 1, 30, 2, 31, 1]}


def build(folder: Path, config: dict[str, Any], recipe: Recipe = RECIPES["fp32"], **options: Any) -> tuple[Graph, Path]:
    """The graph of a tiny checkpoint, and the folder it stands in."""
    folder.mkdir()
    with open_checkpoint(tiny.write_folder(folder / "checkpoint", config, seed=golden.SEED)) as checkpoint:
        return build_graph(checkpoint, folder, recipe, progress=Silent(), **options), folder


def logits(folder: Path, ids: NDArray[np.int64], sizes: Sequence[int]) -> NDArray[np.float32]:
    """Logits [batch, tokens, padded_vocab] of ids [batch, tokens], fed in pieces."""
    decoder = Decoder(folder, batch=len(ids))
    starts = np.cumsum([0, *sizes])
    assert starts[-1] == ids.shape[1]
    parts = [decoder.append(ids[:, start:stop]) for start, stop in pairwise(starts)]
    return np.concatenate([part.reshape(len(ids), -1, part.shape[-1]) for part in parts], axis=1)


@pytest.mark.parametrize("case", golden.CASES)
class TestParity:
    """The fp32 graph against transformers' eager model."""

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_one_sequence(self, case: str, schedule: str, tmp_path: Path) -> None:
        _, folder = build(tmp_path / "graph", tiny_qwen3_5.config(**golden.CASES[case]))
        found = logits(folder, golden.prompts()[:1], SCHEDULES[schedule])[..., :: golden.EVERY]
        self.check(found, golden.read(case)[:1])

    def test_a_batch(self, case: str, tmp_path: Path) -> None:
        """Rows of one prompt length, then steps of one token each; the config is that of a model of text alone."""
        _, folder = build(tmp_path / "graph", tiny_qwen3_5.text_config(**golden.CASES[case]))
        found = logits(folder, golden.prompts(), [40, *[1] * 32])[..., :: golden.EVERY]
        self.check(found, golden.read(case))

    def check(self, found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        difference = np.abs(found - expected).max()
        assert difference < TOLERANCE
        assert difference < TOLERANCE * np.abs(expected).max()


def test_states_may_stand_where_they_stood(tmp_path: Path) -> None:
    """Outputs bound to the memory of their inputs, in steps shorter and longer than the convolution."""
    _, folder = build(tmp_path / "graph", tiny_qwen3_5.config(linear_num_value_heads=4))
    ids = golden.prompts()[:1]
    session = ort.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for value in session.get_inputs():
        if value.name.startswith("past"):
            sizes = [dim if isinstance(dim, int) else 80 for dim in value.shape[1:]]
            memory = ort.OrtValue.ortvalue_from_numpy(np.zeros([1, *sizes], np.float32))
            binding.bind_ortvalue_input(value.name, memory)
            binding.bind_ortvalue_output(present_name(value.name), memory)
    found, start = [], 0
    for size in SCHEDULES["chunked"]:
        total = start + size
        for name, array in lengths(start, size).items():
            binding.bind_cpu_input(name, array)
        binding.bind_cpu_input("input_ids", ids[:, start:total])
        binding.bind_cpu_input("logits_indices", np.arange(size))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        found.append(binding.get_outputs()[-1].numpy())
        start = total
    expected = logits(folder, ids, SCHEDULES["chunked"])[0]
    np.testing.assert_array_equal(np.concatenate(found), expected)


def export(source: Path, output: Path, recipe: str = "balanced", **options: Any) -> Report:
    with open_checkpoint(source) as checkpoint:
        return export_bundle(checkpoint, output, RECIPES[recipe], progress=Silent(), **options)


def write_published(folder: Path, config: dict[str, Any], template: str = tiny.CHAT_TEMPLATE) -> Path:
    """A folder as the makers publish it: no generation_config.json, the chat template in a file of its own."""
    tiny.write_folder(folder, config)
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


class TestBundle:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_the_manifest_says_what_the_graph_asks_for(self, recipe: str, tmp_path: Path) -> None:
        config = tiny_qwen3_5.config(linear_num_value_heads=4)
        report = export(write_published(tmp_path / "Tiny", config), tmp_path / "bundle", recipe)
        manifest = verify_bundle(report.folder)
        assert manifest == report.manifest
        assert manifest.model_type == "qwen3_5"
        assert manifest.kv == KVLayout(layers=1, kv_heads=2, head_dim=64)
        # Two key heads of 16 for queries and keys each, four value heads of 32.
        sizes = {"conv_channels": 192, "conv_kernel": 3, "value_heads": 4, "key_dim": 16, "value_dim": 32}
        assert manifest.state == StateLayout(layers=3, **sizes)
        assert manifest.state.bytes_per_slot == 4 * 3 * (192 * 3 + 4 * 16 * 32)
        text = [tensor for name, tensor in tiny.random_tensors(config).items() if name.startswith("model.language_")]
        assert manifest.parameter_count == sum(tensor.size for tensor in text)
        kv, state = "FLOAT[batch,2,max_length,64]", ("FLOAT[batch,192,3]", "FLOAT[batch,4,16,32]")
        graph = ir.load(report.folder / GRAPH).graph
        found = {str(each.name): f"{each.dtype}{each.shape}" for each in (*graph.inputs, *graph.outputs)}
        expected = {"past_key_values.0.key": kv, "past_key_values.0.value": kv}
        for index in range(3):
            expected |= {f"past_conv.{index}": state[0], f"past_recurrent.{index}": state[1]}
        expected |= {present_name(name): shape for name, shape in expected.items()}
        assert {name: shape for name, shape in found.items() if name.startswith(("past", "present"))} == expected

    def test_two_exports_are_byte_identical(self, tmp_path: Path) -> None:
        source = write_published(tmp_path / "Tiny", tiny_qwen3_5.config())
        first, second = (export(source, tmp_path / name).folder for name in ("first", "second"))
        for path in first.iterdir():
            assert path.read_bytes() == (second / path.name).read_bytes()

    def test_vision_and_prediction_change_nothing(self, tmp_path: Path) -> None:
        seeing = export(write_published(tmp_path / "m", tiny_qwen3_5.config()), tmp_path / "seeing")
        text = export(write_published(tmp_path / "text" / "m", tiny_qwen3_5.text_config()), tmp_path / "of-text")
        prediction = "15 tensors of multi-token prediction are skipped: --mtp keeps them"
        assert seeing.notes == ("only the text part is exported: 2 tensors of vision are skipped", prediction)
        assert text.notes == (prediction,)
        for name in (WEIGHTS, GENERATION, TOKENIZER, CHAT_TEMPLATE):
            assert (seeing.folder / name).read_bytes() == (text.folder / name).read_bytes()

    @pytest.mark.parametrize(
        ("folder", "temperature", "top_p"),
        [("Qwen3.5-0.8B", 0.7, 0.8), ("Qwen3.5-4B", 1.0, 0.95), ("our-own", 0.7, 0.8)],
    )
    def test_the_text_side(self, folder: str, temperature: float, top_p: float, tmp_path: Path) -> None:
        """Two stop ids: the config's, which ends a text, and the one that ends a turn."""
        report = export(write_published(tmp_path / folder, tiny_qwen3_5.config()), tmp_path / "bundle")
        assert (report.folder / TOKENIZER).read_bytes() == tiny.tokenizer_json(tiny_qwen3_5.REGEX)
        generation = json.loads((report.folder / GENERATION).read_text("utf-8"))
        assert generation["eos_token_ids"] == [tiny_qwen3_5.EOS_TEXT, tiny.EOS]
        assert (generation["do_sample"], generation["top_k"]) == (True, 20)
        assert (generation["temperature"], generation["top_p"]) == (temperature, top_p)

    def test_a_tokenizer_that_cuts_text_as_older_models_do_is_noticed(self, tmp_path: Path) -> None:
        source = write_published(tmp_path / "m", tiny_qwen3_5.config())
        (source / "tokenizer.json").write_bytes(tiny.tokenizer_json())
        assert any("Hindi, Thai, Arabic" in note for note in export(source, tmp_path / "bundle").notes)

    def test_a_vocabulary_and_merges_become_the_same_tokenizer(self, tmp_path: Path) -> None:
        source = write_published(tmp_path / "m", tiny_qwen3_5.config())
        published = json.loads((source / "tokenizer.json").read_text("utf-8"))
        (source / "tokenizer.json").unlink()
        tiny.write_json(source / "vocab.json", published["model"]["vocab"])
        (source / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tiny.MERGES), encoding="utf-8")
        added = {str(each["id"]): each for each in published["added_tokens"]}
        tiny.write_json(source / "tokenizer_config.json", {"added_tokens_decoder": added})
        report = export(source, tmp_path / "bundle")
        assert not any("Hindi" in note for note in report.notes)
        rebuilt = json.loads((report.folder / TOKENIZER).read_text("utf-8"))
        assert rebuilt["pre_tokenizer"]["pretokenizers"][0] == published["pre_tokenizer"]["pretokenizers"][0]

    @pytest.mark.parametrize(("template", "ending"), [("template", OPEN), ("small", CLOSED)])
    def test_thinking_is_the_templates_choice(self, template: str, ending: str, tmp_path: Path) -> None:
        """The template of 4B and 9B thinks unless told not to, that of 0.8B and 2B the other way round."""
        text = (TEMPLATES / f"{template}.jinja").read_text("utf-8")
        report = export(write_published(tmp_path / "m", tiny_qwen3_5.config(), text), tmp_path / "bundle")
        assert (report.folder / CHAT_TEMPLATE).read_text("utf-8") == text
        chat, messages = ChatTemplate.load(report.folder / CHAT_TEMPLATE), [{"role": "user", "content": "Hello"}]
        assert chat.render(messages).endswith(f"Hello<|im_end|>\n<|im_start|>assistant\n{ending}")
        assert chat.render(messages, enable_thinking=True).endswith(OPEN)
        assert chat.render(messages, enable_thinking=False).endswith(CLOSED)
        assert chat.thinks == "optional"

    def test_an_int8_cache_leaves_the_states_alone(self, tmp_path: Path) -> None:
        report = export(write_published(tmp_path / "m", tiny_qwen3_5.config()), tmp_path / "bundle", kv="int8")
        graph = ir.load(report.folder / GRAPH).graph
        types = {str(value.name).partition(".")[0]: str(value.dtype) for value in graph.inputs}
        assert types["past_key_values"] == "INT8"
        assert types["past_conv"] == types["past_recurrent"] == "FLOAT"
        assert report.manifest.kv.bytes_per_token == 2 * 2 * 64


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_published(tmp_path / "Tiny-3.5", tiny_qwen3_5.config(linear_num_value_heads=4))
    assert edge.cli.run(["export", str(source), "-o", str(tmp_path / "bundle"), "--offline"]) == 0
    shown = capsys.readouterr()
    assert "model      tiny-3.5, " in shown.out
    assert "cache each\nstate      31,488 bytes for each sequence\n" in shown.out
    assert "note: only the text part is exported: 2 tensors of vision are skipped" in shown.err


def run_with_adapter(bundle: Path, adapter: Path, config: AdapterConfig) -> NDArray[np.float32]:
    """Logits [tokens, padded_vocab] of a prompt with the adapter's matrices in every place."""
    decoder, ids = Decoder(bundle), golden.prompts()[:1]
    inputs = {value.name: value.shape for value in decoder._session.get_inputs()}
    places = Places(inputs)
    read = places.read(adapter / "adapter_model.safetensors", config)
    groups = {name: np.ones([read.groups, 1, 1, 1], np.float32) for name in inputs if name.endswith(".groups")}
    tokens = {"input_ids": ids, "logits_indices": np.arange(ids.size), **lengths(0, ids.size)}
    found: NDArray[np.float32] = decoder._session.run(
        ["logits"], {**tokens, **decoder._memory, **places.stack([read]), **groups}
    )[0]
    return found


def test_adapters_compute_what_merged_weights_do(tmp_path: Path) -> None:
    """Adapters of every projection, saved by a model that sees."""
    changes = {"linear_num_value_heads": 4}
    weights = tiny.random_tensors(tiny_qwen3_5.text_config(**changes))
    shapes = {name: each.shape for name, each in weights.items() if re.search(r"layers.*proj", name)}
    tensors = peft.adapter_tensors(shapes, 4, targets={name.split(".")[-2] for name in shapes})
    seeing = {name.replace("model.layers", "model.language_model.layers"): each for name, each in tensors.items()}
    adapter = peft.write_adapter(tmp_path / "adapter", seeing)
    source = tiny.write_folder(tmp_path / "m", tiny_qwen3_5.config(**changes))
    bundle = export(source, tmp_path / "bundle", "fp32", adapters={"a": adapter}).folder
    found = run_with_adapter(bundle, adapter, AdapterConfig(rank=4, scale=2.0))
    merged = tiny.write_folder(tmp_path / "merged", tiny_qwen3_5.text_config(**changes))
    tiny.write_safetensors(merged / "model.safetensors", peft.merge(weights, tensors, 2.0), "F32")
    ids = golden.prompts()[0]
    expected = Decoder(export(merged, tmp_path / "merged-bundle", "fp32").folder).append(ids)
    plain = Decoder(export(source, tmp_path / "plain-bundle", "fp32").folder).append(ids)
    assert np.abs(found - expected).max() < 1e-3
    assert np.abs(plain - expected).max() > 0.1


class TestOracle:
    """``--verify``: the parity of a whole checkpoint needs transformers 5; the stored logits stand in for it here."""

    def test_what_it_is_given_is_the_text_part(self, tmp_path: Path) -> None:
        with open_checkpoint(tiny.write_folder(tmp_path / "m", tiny_qwen3_5.config())) as checkpoint:
            write_folder(checkpoint, tmp_path / "for-oracle")
            config = json.loads((tmp_path / "for-oracle" / "config.json").read_text("utf-8"))
            assert (config["architectures"], config["model_type"]) == (["Qwen3_5ForCausalLM"], "qwen3_5_text")
            with open_checkpoint(tmp_path / "for-oracle") as given:
                text = {name for name in checkpoint.tensors if not name.startswith("mtp.")}
                assert given.tensors.keys() == text
                for name in given.tensors:
                    np.testing.assert_array_equal(given.rows(name), checkpoint.rows(name))

    def test_optimum_is_not_asked(self, tmp_path: Path) -> None:
        with open_checkpoint(tiny.write_folder(tmp_path / "m", tiny_qwen3_5.config())) as checkpoint:
            with pytest.raises(ConfigError, match="optimum knows no qwen3_5") as caught:
                verify_against(Oracle.OPTIMUM, checkpoint, progress=Silent())
            assert "transformers 5" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layer_types": ["linear_attention"] * 4}, "layer_types are not 4 times"),
        ({"layer_types": ["full_attention"]}, "layer_types are not 4 times"),
        ({"layer_types": "full_attention"}, "layer_types are not 4 times"),
        (
            {"layer_types": ["linear_attention", "full_attention", "sliding_attention", 1]},
            "layer_types are not 4 times",
        ),
        ({"attn_output_gate": False}, "without an output gate"),
        ({"attention_bias": True}, "biases"),
        ({"linear_num_value_heads": 3}, "3 value heads of linear attention are no multiple of 2"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim is None"),
        ({"head_dim": 32}, "8 rotated of 32 head dimensions"),
        ({"rope_parameters": {"partial_rotary_factor": "1"}}, "partial_rotary_factor is '1'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ],
)
def test_configs_that_cannot_be_exported(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        architecture_for(tiny_qwen3_5.text_config(**changes))
    assert expected in caught.value.message
    assert caught.value.hint


def test_every_fourth_layer_has_full_attention_where_the_config_lists_none() -> None:
    config = tiny_qwen3_5.text_config(num_hidden_layers=9, layer_types=None)
    found = architecture_for(config)
    assert found.kv_layout().layers == 2
    assert {name.split(".")[2] for name in found.tensors() if ".q_proj" in name} == {"3", "7"}


class TestTextPart:
    """What is taken from a model that sees."""

    def test_two_tensors_under_one_name(self) -> None:
        names = ["model.norm.weight", "model.language_model.norm.weight"]
        with pytest.raises(CheckpointError, match="stands there twice"):
            text_tensors({"model_type": "qwen3_5"}, dict.fromkeys(names, 0))

    def test_a_tensor_of_an_unknown_part_is_refused(self, tmp_path: Path) -> None:
        source = write_published(tmp_path / "m", tiny_qwen3_5.config())
        tensors = tiny.random_tensors(tiny_qwen3_5.config()) | {"model.audio.proj.weight": np.zeros((4, 4), np.float32)}
        tiny.write_safetensors(source / "model.safetensors", tensors)
        with pytest.raises(CheckpointError, match=r"no place in the model: model\.audio\.proj\.weight"):
            export(source, tmp_path / "bundle")

    def test_other_families_keep_their_tensors(self) -> None:
        assert text_tensors({"model_type": "qwen3"}, {"mtp.fc.weight": 1}) == ({"mtp.fc.weight": 1}, [])

    def test_a_text_config_that_is_none(self) -> None:
        with pytest.raises(CheckpointError, match="text_config is not an object"):
            text_config({"text_config": ["qwen3_5_text"]})
