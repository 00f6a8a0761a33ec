"""Tiny bundles and what this machine makes of them, for tests that run under the emulator.

What ends in ``.exact`` was computed with activations in float32, as cores without products of bytes take them.

python -m tests.arm64.reference FOLDER

Writes ``FOLDER/bundles/FAMILY-RECIPE``, ``FOLDER/products/BITS-BLOCK.onnx`` and ``FOLDER/values.npz``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge.tokenizer import Tokenizer
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.arm64.values import Floats, multiply, open_engine, say
from tests.export import tiny, tiny_qwen3_5

NUM_TOKENS = 16
PROMPT_LENGTH = 25
# Wide enough for blocks of 128 to be two in a row.
WIDE = {"hidden_size": 256, "intermediate_size": 384}
FAMILIES = {
    "qwen2": tiny.qwen2_config(**WIDE),
    "qwen3": tiny.qwen3_config(**WIDE),
    "qwen3_5": tiny_qwen3_5.text_config(),
}
FORMS = [(bits, block) for bits in (4, 8) for block in (32, 64, 128)]
COLUMNS, ROWS = 256, 384


def main(folder: Path) -> None:
    """Write it all."""
    values: dict[str, Floats | np.ndarray] = {}
    rng = np.random.default_rng(11)
    values["prompt"] = prompt = rng.integers(0, tiny.NUM_IDS, PROMPT_LENGTH)
    for family, config in FAMILIES.items():
        with open_checkpoint(tiny.write_folder(folder / "checkpoints" / family, config)) as checkpoint:
            for recipe in ("fp32", "int8", "balanced", "small"):
                bundle = folder / "bundles" / f"{family}-{recipe}"
                export_bundle(checkpoint, bundle, RECIPES[recipe], progress=Silent())
                said = say(open_engine(bundle), prompt, NUM_TOKENS)
                values[f"{bundle.name}.tokens"] = np.array(said.tokens)
                values[f"{bundle.name}.logits"] = said.logits
                exact = folder / "exact" / bundle.name
                export_bundle(checkpoint, exact, replace(RECIPES[recipe], accuracy_level=0), progress=Silent())
                values[f"{bundle.name}.exact"] = say(open_engine(exact), prompt, NUM_TOKENS, given=said.tokens).logits
                text = Tokenizer.load(bundle / "tokenizer.json").decode(said.tokens)
                values[f"{bundle.name}.text"] = np.array(text)
    values["x"] = x = rng.standard_normal((37, COLUMNS)).astype(np.float32)
    (folder / "products").mkdir()
    for bits, block in FORMS:
        model = folder / "products" / f"{bits}-{block}.onnx"
        onnx.save(product(bits, block), model)
        values[model.stem] = multiply(model, x)
        values[f"{model.stem}.exact"] = x @ dequantized(bits, block).T
    np.savez(folder / "values.npz", **values)


def weights(bits: int, block: int) -> dict[str, NDArray[Any]]:
    """Random weights as MatMulNBits takes them."""
    rng = np.random.default_rng(bits * block)
    blocks = COLUMNS // block
    return {
        "codes": rng.integers(0, 256, (ROWS, blocks, block * bits // 8)).astype(np.uint8),
        "scales": ((rng.random((ROWS, blocks)) + 0.5) * 2.0 ** (-bits - 1)).astype(np.float32),
        "zero_points": rng.integers(0, 256, (ROWS, (blocks * bits + 7) // 8)).astype(np.uint8),
    }


def dequantized(bits: int, block: int) -> Floats:
    """The same weights as floats [ROWS, COLUMNS]: what cores without products of bytes multiply with."""
    given = weights(bits, block)
    codes, zero_points = (_unpacked(given[name], bits) for name in ("codes", "zero_points"))
    centered = codes - zero_points[:, : COLUMNS // block, None]
    floats: Floats = (centered * given["scales"][..., None]).reshape(ROWS, COLUMNS).astype(np.float32)
    return floats


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int16]:
    """Codes of 4 bits stand in pairs, the lower half first."""
    if bits == 8:
        return packed.astype(np.int16)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.int16)


def product(bits: int, block: int) -> onnx.ModelProto:
    """MatMulNBits with int8 activations and random weights, as bundles have it."""
    initializers = weights(bits, block)
    node = helper.make_node(
        "MatMulNBits", ["x", *initializers], ["y"], domain="com.microsoft",
        K=COLUMNS, N=ROWS, bits=bits, block_size=block, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", COLUMNS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", ROWS])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
