"""Qwen3.5: what its graph computes against transformers 5, and its checkpoints end to end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from edge.bundle import GRAPH
from export.checkpoint import open_checkpoint
from export.graph import present_name
from export.oracle import Decoder
from export.pipeline import Graph, build_graph
from export.progress import Silent
from export.quantize.recipes import RECIPES, Recipe
from export.segments import lengths
from tests.export import tiny, tiny_qwen3_5
from tests.oracle import golden_qwen3_5 as golden

TOLERANCE = 5e-4
"""Absolute, for a logit; the largest are about 3."""
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
