"""The rotary tables, which onnxruntime computes when it loads a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from edge.bundle import GRAPH, read_manifest
from edge.engine.engine import Engine
from edge.engine.session import shorten_rotary_tables
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.export import tiny, tiny_qwen3_5

CONTEXT = 200


def export(folder: Path, config: dict[str, Any]) -> Path:
    with open_checkpoint(tiny.write_folder(folder / "checkpoint", config)) as checkpoint:
        export_bundle(checkpoint, folder / "bundle", RECIPES["small"], progress=Silent(), context=CONTEXT)
    return folder / "bundle"


def tables(bundle: Path, context: int | None = None) -> list[NDArray[np.float32]]:
    """Cosines and sines as attention gets them in a session for so many tokens; None = as many as the graph takes."""
    whole = ir.load(bundle / GRAPH)
    attention = next(node for node in whole.graph if node.op_type == "GroupQueryAttention")
    names = [str(value.name) for value in attention.inputs[7:9] if value is not None]
    part = ir.convenience.extract(whole.graph, [], names)
    part.opset_imports.update(whole.graph.opset_imports)
    for value in part.outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
    if context is not None:
        shorten_rotary_tables(options, bundle / GRAPH, context)
    model = ir.to_proto(ir.Model(part, ir_version=whole.ir_version)).SerializeToString()
    found: list[NDArray[np.float32]] = ort.InferenceSession(model, options, ["CPUExecutionProvider"]).run(names, {})
    return found


@pytest.mark.parametrize(
    ("config", "theta", "rotary_dim"),
    [(tiny.qwen2_config(), 1e6, 16), (tiny_qwen3_5.config(), 1e7, 16)],
    ids=["whole heads", "a part of them"],
)
def test_every_position_has_the_angles_of_float64(
    config: dict[str, Any], theta: float, rotary_dim: int, tmp_path: Path
) -> None:
    bundle = export(tmp_path, config)
    rows = [[position / theta ** (2 * i / rotary_dim) for i in range(rotary_dim // 2)] for position in range(208)]
    for found, function in zip(tables(bundle), (np.cos, np.sin), strict=True):
        assert found.dtype == np.float32
        # Half a unit in the last place, and what powers of another library differ by.
        np.testing.assert_allclose(found, function(np.array(rows)), rtol=6e-8, atol=1e-11)
    for short, whole in zip(tables(bundle, context=60), tables(bundle), strict=True):
        np.testing.assert_array_equal(short, whole[:64])


def test_an_engine_for_a_shorter_context_computes_the_same(tmp_path: Path) -> None:
    bundle, ids = export(tmp_path, tiny.qwen2_config()), np.arange(60) % tiny.NUM_IDS
    long, short = (
        Engine(bundle, read_manifest(bundle), slots=1, context=context, prefill_chunk=64, threads=1)
        for context in (CONTEXT, len(ids))
    )
    np.testing.assert_array_equal(short.prefill(0, ids, 0), long.prefill(0, ids, 0))
