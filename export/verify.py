"""Does the bundle compute what the checkpoint says? Checks that every export runs before it may be called a bundle.

:func:`check_kernels` proves the layout of every quantized matrix: onnxruntime's kernel at accuracy level 0 against the
dequantized values. :func:`self_test` loads the finished folder in a process of its own and generates from it. Parity of
the graph itself with transformers and optimum is in ``export.oracle``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edge.errors import ExportError
from export.quantize.blockwise import QuantizedRows, dequantize_rows
from export.quantize.recipes import Blockwise

KERNEL_TOLERANCE = 1e-5
"""Largest difference between kernel and dequantized product, relative to the product's largest value."""
_SAMPLE_ROWS = 64
_SELF_TEST_TIMEOUT_S = 1800


def check_kernels(model: ir.Model) -> float:
    """Run the first rows of every quantized matrix of ``model`` through the real kernel.

    Returns:
        The largest relative difference found.

    Raises:
        ExportError: a matrix differs by more than :data:`KERNEL_TOLERANCE`.
    """
    worst, rng = 0.0, np.random.default_rng(0)
    for node in model.graph:
        if node.op_type != "MatMulNBits":
            continue
        form = Blockwise(bits=node.attributes["bits"].as_int(), block=node.attributes["block_size"].as_int())
        columns = node.attributes["K"].as_int()
        rows = _sample(node)
        x = rng.standard_normal((3, columns), dtype=np.float32)
        expected = x @ dequantize_rows(rows, form, columns).T
        found = _run_kernel(x, rows, form)
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        worst = max(worst, difference)
        if not difference <= KERNEL_TOLERANCE:
            message = f"{node.inputs[1].name if node.inputs[1] else node.name}: kernel and codes differ by {difference}"
            raise ExportError(message, hint="this is a defect of qwedge or of onnxruntime: please report it")
    return worst


def self_test(folder: Path, kv: dict[str, int], prompt_ids: list[int], num_tokens: int) -> dict[str, Any]:
    """Generate from the bundle in ``folder`` in a process of its own (see ``export.self_test``).

    Returns:
        What it measured: next_ids, load_s, peak_rss_mb.

    Raises:
        ExportError: the graph does not load or its logits are not finite.
    """
    request = {"folder": str(folder), "kv": kv, "prompt_ids": prompt_ids, "num_tokens": num_tokens}
    command = [sys.executable, "-m", "export.self_test"]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, timeout=_SELF_TEST_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        hint = "is there enough free memory to load the model?" if done.returncode < 0 else "try another recipe"
        raise ExportError(f"the bundle failed its self-test: {last}", hint=hint)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _sample(node: ir.Node) -> QuantizedRows:
    codes, scales, zero_points = (_first_rows(value) for value in node.inputs[1:4])
    return QuantizedRows(codes, scales.astype(np.float32), zero_points)


def _first_rows(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert isinstance(value.const_value, ir.ExternalTensor)
    # numpy() maps the file: only the rows copied here are read.
    rows = np.array(value.const_value.numpy()[:_SAMPLE_ROWS])
    value.const_value.release()
    return rows


def _run_kernel(x: NDArray[np.float32], rows: QuantizedRows, form: Blockwise) -> NDArray[np.float32]:
    """``x @ W.T`` by MatMulNBits at accuracy level 0, in a model of one node."""
    count, columns = len(rows.codes), x.shape[1]
    arrays: dict[str, NDArray[Any]] = {"x": x, "codes": rows.codes, "scales": rows.scales}
    arrays["zero_points"] = rows.zero_points
    inputs = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        for name, array in arrays.items()
    ]
    sizes = {"K": columns, "N": count, "bits": form.bits, "block_size": form.block, "accuracy_level": 0}
    node = ir.node("MatMulNBits", inputs, sizes, domain="com.microsoft")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(x), count])
    for value, array in zip(inputs[1:], list(arrays.values())[1:], strict=True):
        value.const_value = ir.tensor(array, name=value.name)
    graph = ir.Graph(
        inputs[:1],
        [y],
        nodes=[node],
        initializers=inputs[1:],
        opset_imports={"": 21, "com.microsoft": 1},
        name="kernel",
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result
