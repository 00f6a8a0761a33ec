"""What an int8 cache does to the time of attention: GroupQueryAttention alone, one thread, both caches in turn.

    .venv/bin/python -m tests.bench.kv_attention

Heads as in Qwen2.5-0.5B and Qwen3-0.6B. The runs alternate, the medians are compared: only ratios are worth anything on
a machine that does other things too. Prints one line per case and a JSON object at the end.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

MODELS = {"qwen2.5-0.5b": (14, 2, 64), "qwen3-0.6b": (16, 8, 128)}
"""Query heads, key heads, width of a head."""
CASES = {
    "decode, past 512": (1, 512),
    "decode, past 2000": (1, 2000),
    "4 tokens, past 1000": (4, 1000),
    "16 tokens, past 1000": (16, 1000),
    "prefill 256": (256, 0),
    "256 tokens, past 1000": (256, 1000),
}
"""New tokens and past."""
ROUNDS = 30


@dataclass(frozen=True)
class Result:
    """One case."""

    model: str
    case: str
    float32_ms: float
    int8_ms: float
    ratio: float
    """int8 to float32."""


class Attention:
    """A model of one node, past and present in the same memory."""

    def __init__(self, heads: tuple[int, int, int], new: int, past: int, *, int8: bool) -> None:
        num_heads, kv_heads, head_dim = heads
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(_model(heads, int8=int8), options, ["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        rng, total = np.random.default_rng(0), past + new
        cache = rng.integers(-127, 127, (2, 1, kv_heads, total, head_dim))
        self._keep: list[NDArray[np.generic]] = []
        self._bind("qkv", rng.standard_normal((1, new, (num_heads + 2 * kv_heads) * head_dim), dtype=np.float32))
        for kind, values in zip(("key", "value"), cache, strict=True):
            array = values.astype(np.int8) if int8 else (values * np.float32(0.02)).astype(np.float32)
            self._bind(f"past_{kind}", array)
            self._binding.bind_output(f"present_{kind}", "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._bind("seqlens_k", np.array([total - 1], np.int32))
        self._bind("total", np.array(total, np.int32))
        self._binding.bind_output("y", "cpu")

    def _bind(self, name: str, array: NDArray[np.generic]) -> None:
        self._keep.append(array)
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def milliseconds(self) -> float:
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return (time.perf_counter() - started) * 1e3


def _model(heads: tuple[int, int, int], *, int8: bool) -> bytes:
    num_heads, kv_heads, head_dim = heads
    cache_type = ir.DataType.INT8 if int8 else ir.DataType.FLOAT

    def value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    cache: list[int | str] = ["b", kv_heads, "m", head_dim]
    inputs = [
        value("qkv", ir.DataType.FLOAT, ["b", "s", (num_heads + 2 * kv_heads) * head_dim]),
        value("past_key", cache_type, cache),
        value("past_value", cache_type, cache),
        value("seqlens_k", ir.DataType.INT32, ["b"]),
        value("total", ir.DataType.INT32, []),
    ]
    attributes: dict[str, int | str] = {"num_heads": num_heads, "kv_num_heads": kv_heads}
    scales = []
    if int8:
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        array = np.full((1, kv_heads, 1, head_dim), 0.02, np.float32)
        for name in ("k_scale", "v_scale"):
            scale = value(name, ir.DataType.FLOAT, list(array.shape))
            scale.const_value = ir.tensor(array, name=name)
            scales.append(scale)
    operands = [inputs[0], None, None, *inputs[1:], None, None, None, None, None, *scales]
    node = ir.node("GroupQueryAttention", operands, attributes, domain="com.microsoft", num_outputs=3)
    shapes: list[list[int | str]] = [["b", "s", num_heads * head_dim], cache, cache]
    kinds = [("y", ir.DataType.FLOAT), ("present_key", cache_type), ("present_value", cache_type)]
    for output, (name, dtype), shape in zip(node.outputs, kinds, shapes, strict=True):
        output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    graph = ir.Graph(
        inputs, node.outputs, nodes=[node], initializers=scales, opset_imports={"": 21, "com.microsoft": 1}, name="gqa"
    )
    return bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


def measure(model: str, case: str) -> Result:
    pair = [Attention(MODELS[model], *CASES[case], int8=int8) for int8 in (False, True)]
    times = [[each.milliseconds() for each in pair] for _ in range(ROUNDS + 3)][3:]
    float32_ms, int8_ms = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(int8 / float32 for float32, int8 in times)
    return Result(model, case, round(float32_ms, 3), round(int8_ms, 3), round(ratio, 2))


def main() -> None:
    results = [measure(model, case) for model in MODELS for case in CASES]
    for each in results:
        print(f"{each.model:<13} {each.case:<22} {each.float32_ms:7.2f} -> {each.int8_ms:7.2f} ms, {each.ratio:.2f}x")
    print(json.dumps([asdict(each) for each in results]))


if __name__ == "__main__":
    main()
