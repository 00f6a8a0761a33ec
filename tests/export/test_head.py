"""The head in two stages: all logits from a coarse copy of the table, those of candidates from the table itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from edge.bundle import GRAPH
from export.build import Graph, build_graph
from export.checkpoint import open_checkpoint
from export.graph import COARSE_LOGITS, FINAL_HIDDEN
from export.progress import Silent
from export.quantize.blockwise import dequantize_rows, quantize_split, split_forms
from export.quantize.recipes import RECIPES, Blockwise, Projections, TwoStage
from tests.export import tiny

CANDIDATES = 8


@dataclass
class Head:
    """The head of a built graph, to be run by itself."""

    graph: Graph
    folder: Path
    weights: NDArray[np.float32]
    """What the checkpoint says the table is [rows, columns]."""

    def hidden(self, rows: int) -> NDArray[np.float32]:
        """Final hidden states that point at a token each, more or less."""
        rng = np.random.default_rng(5)
        towards = self.weights[rng.integers(0, len(self.weights), rows)]
        noise = rng.standard_normal(towards.shape, dtype=np.float32)
        return np.asarray(towards + 0.7 * noise, np.float32)

    def run(self, x: NDArray[np.float32], output: str = "logits") -> NDArray[np.float32]:
        """What the saved graph makes of hidden states [positions, columns]."""
        return self.session(output).run([output], {FINAL_HIDDEN: x})[0]  # type: ignore[no-any-return]

    def session(self, output: str = "logits", threads: int = 1) -> ort.InferenceSession:
        """The saved graph from the final hidden state to ``output``."""
        whole = ir.load(self.folder / GRAPH)
        part = ir.convenience.extract(whole.graph, [FINAL_HIDDEN], [output])
        part.opset_imports.update(whole.graph.opset_imports)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        model = ir.to_proto(ir.Model(part, ir_version=whole.ir_version)).SerializeToString()
        return ort.InferenceSession(model, options, ["CPUExecutionProvider"])


def table(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """What upper and lower bits of the codes stand for together [rows, columns]."""
    form = RECIPES["balanced"].table
    assert isinstance(form, Blockwise)
    columns = weights.shape[1]
    (upper, lower), (copy, rest) = quantize_split(weights, form), split_forms(form)
    fine = dequantize_rows(lower, rest, columns) / 2**rest.bits
    return np.add(dequantize_rows(upper, copy, columns), fine, dtype=np.float32)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def head(request: pytest.FixtureRequest, tmp_path: Path) -> Head:
    layer = Projections.all(Blockwise(4, 32))
    recipe = replace(RECIPES["balanced"], layer=layer, narrow=None, head=TwoStage(CANDIDATES))
    config = tiny.qwen2_config(hidden_size=384, vocab_size=2048, tie_word_embeddings=request.param)
    with open_checkpoint(tiny.write_folder(tmp_path / "checkpoint", config)) as checkpoint:
        graph = build_graph(checkpoint, tmp_path, recipe, progress=Silent())
    name = "model.embed_tokens.weight" if request.param else "lm_head.weight"
    return Head(graph, tmp_path, tiny.random_tensors(config)[name])


def test_candidates_are_exact_and_the_others_coarse(head: Head) -> None:
    x = head.hidden(40)
    coarse, found = head.run(x, COARSE_LOGITS), head.run(x)
    exact = x @ table(head.weights).T
    best = np.argsort(-coarse, axis=1)[:, :CANDIDATES]
    expected = coarse.copy()
    np.put_along_axis(expected, best, np.take_along_axis(exact, best, axis=1), axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(exact).max())


def test_the_coarse_logits_come_from_the_same_weights(head: Head) -> None:
    x = head.hidden(40)
    exact = x @ head.weights.T
    error = np.linalg.norm(head.run(x, COARSE_LOGITS) - exact) / np.linalg.norm(exact)
    assert 0.01 < error < 0.15


def test_coarse_logits_are_nearly_exact_in_the_channels_that_the_final_norm_makes_largest(tmp_path: Path) -> None:
    config = tiny.qwen2_config(hidden_size=384, vocab_size=2048)
    tensors = tiny.random_tensors(config)
    largest = np.random.default_rng(3).choice(384, 32, replace=False)
    tensors["model.norm.weight"][largest] *= 16
    tiny.write_safetensors(tiny.write_folder(tmp_path / "checkpoint", config) / "model.safetensors", tensors)
    recipe = replace(RECIPES["balanced"], head=TwoStage(CANDIDATES))
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        graph = build_graph(checkpoint, tmp_path, recipe, progress=Silent())
    head = Head(graph, tmp_path, tensors["model.embed_tokens.weight"])
    error = head.run(np.eye(384, dtype=np.float32), COARSE_LOGITS) - head.weights.T
    sizes = np.linalg.norm(error, axis=1)
    others = np.setdiff1d(np.arange(384), largest)
    assert sizes[largest].max() < 0.2 * sizes[others].min()


def test_greedy_finds_what_the_table_says_is_best(head: Head) -> None:
    """Float activations: the exact products do not even lose what int8 activations cost the plain head."""
    x = head.hidden(300)
    exact = x @ table(head.weights).T
    assert (head.run(x).argmax(axis=1) == exact.argmax(axis=1)).mean() > 0.98
    assert (head.run(x, COARSE_LOGITS).argmax(axis=1) == exact.argmax(axis=1)).mean() < 0.98


@pytest.mark.parametrize("threads", [1, 2])
def test_how_many_positions_there_are_changes_no_bit_of_a_candidate(head: Head, threads: int) -> None:
    x, session = head.hidden(24), head.session(threads=threads)
    alone = np.concatenate([session.run(None, {FINAL_HIDDEN: row[None]})[0] for row in x])
    best = np.argsort(-alone, axis=1)[:, : CANDIDATES // 2]
    for count in (2, 3, 8, 24):
        together = session.run(None, {FINAL_HIDDEN: x[:count]})[0]
        np.testing.assert_array_equal(*(np.take_along_axis(y[:count], best[:count], 1) for y in (alone, together)))
        # The coarse kernel sums blocks of 128 in another order for one row than for several.
        np.testing.assert_allclose(together, alone[:count], atol=1e-5 * np.abs(alone).max())


def test_only_the_coarse_copy_is_read_whole(head: Head) -> None:
    architecture = head.graph.architecture
    per_weight = 4 / 8 + 2 / 128 + 0.5 / 128
    correction = 2048 * 32 * (4 / 8 + 2 / 32)
    table = 2048 * 384 * per_weight + correction + CANDIDATES * 384 * (6 / 8 + 2.5 / 128)
    others = sum(math.prod(shape) for name, shape in architecture.tensors().items() if ".layers." in name)
    # Blocks of 32: the coarse head and the candidates' rows are what else a step reads.
    assert head.graph.weight_bytes_per_token == pytest.approx(table + others * (4 / 8 + 2.5 / 32), rel=0.02)
