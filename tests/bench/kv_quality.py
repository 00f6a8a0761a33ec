"""What an int8 cache costs: the next-token distributions of one model with both caches, over a text of its own.

    .venv/bin/python -m tests.bench.kv_quality qwen2.5-coder-0.5b-instruct

The text beside this file shares nothing with the one that the export calibrates with. Every distribution is compared
with that of the float32 cache. Rounding activations to int8 turns the smallest change into a visible one, so a third
graph gives the measure: a float32 cache whose rotary tables are off by one part in 100,000.
Prints one line per variant and a JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge.bundle import GRAPH, TOKENIZER, WEIGHTS, CacheType, read_manifest
from edge.bundle.rotary import POSITIONS
from export.graph import ROTARY_FREQUENCIES
from export.kv_scales import divergence
from export.oracle import Decoder
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import DEFAULT, RECIPES, recipe_named
from export.sources import default_cache, resolve

CHUNK = 32
"""Tokens of one step: their logits must fit into memory three times."""
DISTURBANCE = 1e-5


@dataclass(frozen=True)
class Result:
    """One variant against the float32 cache."""

    name: str
    tokens: int
    kl: float
    """Mean divergence in nats."""
    kl_p99: float
    top1: float
    """Share of tokens with the same most likely successor."""
    perplexity: float
    bytes_per_token: int
    """Of cache."""


class Tally:
    """Sums up one variant, chunk by chunk."""

    def __init__(self) -> None:
        self._divergences: list[NDArray[np.float32]] = []
        self._same: list[NDArray[np.bool_]] = []
        self._surprise: list[float] = []

    def add(self, expected: NDArray[np.float32], found: NDArray[np.float32], next_ids: NDArray[np.int64]) -> None:
        """Count logits [n, vocabulary]; ``next_ids`` are the tokens that follow, one fewer at the end of the text."""
        self._divergences.append(divergence(expected, found))
        self._same.append(expected.argmax(axis=1) == found.argmax(axis=1))
        for row, token in zip(found.astype(np.float64), next_ids, strict=False):
            self._surprise.append(float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token]))

    def result(self, name: str, bytes_per_token: int) -> Result:
        kl, same = np.concatenate(self._divergences), np.concatenate(self._same)
        return Result(
            name=name,
            tokens=len(kl),
            kl=float(kl.mean()),
            kl_p99=float(np.percentile(kl, 99)),
            top1=float(same.mean()),
            perplexity=float(np.exp(np.mean(self._surprise))),
            bytes_per_token=bytes_per_token,
        )


def export(source: str, folder: Path, recipe: str, kv: CacheType) -> Path:
    with resolve(source, cache=default_cache(), progress=Silent()).open() as checkpoint:
        export_bundle(checkpoint, folder / kv, recipe_named(recipe), progress=Silent(), kv=kv)
    return folder / kv


def disturb(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle's graph, over the same weights, with noise in its rotary tables."""
    model, rng = ir.load(bundle / GRAPH), np.random.default_rng(0)
    shape = int(_constant(model, POSITIONS)), len(_constant(model, ROTARY_FREQUENCIES))
    for node in [node for node in model.graph if node.op_type in {"Cos", "Sin"}]:
        noise = ir.node("Constant", [], {"value": ir.tensor(1 + DISTURBANCE * rng.standard_normal(shape))})
        disturbed = ir.node("Mul", [node.outputs[0], noise.outputs[0]])
        ir.convenience.replace_all_uses_with(node.outputs[0], disturbed.outputs[0])
        disturbed.replace_input_with(0, node.outputs[0])
        model.graph.insert_after(node, [noise, disturbed])
    folder.mkdir()
    # Not before the constants were read: onnx_ir refuses files with two names.
    os.link(bundle / WEIGHTS, folder / WEIGHTS)
    ir.save(model, folder / GRAPH)
    return folder


def _constant(model: ir.Model, name: str) -> NDArray[Any]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def compare(bundles: dict[str, Path], disturbed: Path) -> list[Result]:
    """All variants side by side, so that no logits need to be kept."""
    layouts = {name: read_manifest(bundle).kv for name, bundle in bundles.items()}
    decoders = {name: Decoder(bundle) for name, bundle in bundles.items()}
    layouts["disturbed"] = layouts["float32"]
    decoders["disturbed"] = Decoder(disturbed)
    tokenizer = Tokenizer.from_file(str(bundles["float32"] / TOKENIZER))
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    tallies = {name: Tally() for name in decoders}
    for start in range(0, len(ids), CHUNK):
        chunk, next_ids = ids[start : start + CHUNK], ids[start + 1 : start + CHUNK + 1]
        logits = {name: decoder.append(chunk) for name, decoder in decoders.items()}
        for name, tally in tallies.items():
            tally.add(logits["float32"], logits[name], next_ids)
    return [tally.result(name, layouts[name].bytes_per_token) for name, tally in tallies.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a checkpoint, as for qwedge export")
    parser.add_argument("--recipe", choices=RECIPES, default=DEFAULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kinds: tuple[CacheType, ...] = ("float32", "int8")
        bundles: dict[str, Path] = {kv: export(args.source, folder, args.recipe, kv) for kv in kinds}
        results = compare(bundles, disturb(bundles["float32"], folder / "disturbed"))
    for result in results:
        print(
            f"{result.name:<10} KL {result.kl:.5f} (99%: {result.kl_p99:.4f}), same first choice {result.top1:.2%}, "
            f"perplexity {result.perplexity:.3f}, {result.bytes_per_token:,} bytes per token"
        )
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
