"""What quantized weights cost: next-token distributions of recipes and bundles against the checkpoint in float32.

    .venv/bin/python -m tests.bench.divergence --checkpoint model.gguf balanced small balanced:down=4x32

The reference is the *dithered* checkpoint of :mod:`tests.bench.dither`, which no grid favours. Recipes are exported
from that same checkpoint. A GGUF in place of a recipe is what llama.cpp made of it: ``tests.bench.dither`` writes the
file that ``llama-quantize`` starts from. Its weights are computed with in float32; llama.cpp's 8-bit activations would
cost it a little more.

A recipe may be changed: ``NAME:qkv=8x64s,out=8x64`` gives ``qkv``, ``query_key``, ``value``, ``out``, ``gate_up``,
``down`` (of all layers), ``outer_down`` or ``table`` another format (bits, block, and ``s`` for a symmetric one),
``head=256`` another number of candidates, and ``head=none`` takes the second stage away. The text is cut into windows,
spread evenly over each file; the second half of each is scored. Reference logits are kept in ``--cache``. Prints a line
per result, or a JSON object with ``--json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
from tokenizers import Tokenizer

from edge.bundle import GRAPH, WEIGHTS
from export.build import build_graph
from export.calibration import CalibrationText
from export.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from export.progress import Silent
from export.quantize.recipes import Blockwise, Format, Recipe, TwoStage, recipe_named
from export.report import Windows, compare
from export.segments import Array
from tests.bench.dither import Dithered


@dataclass(frozen=True)
class Result:
    """One recipe, bundle or GGUF against the reference."""

    name: str
    tokens: int
    kl: float
    """Mean divergence in nats."""
    kl_p999: float
    top1: float
    """Share of tokens with the same most likely successor."""
    perplexity: float
    reference_perplexity: float
    disk_bytes: int
    """Of the weights."""
    bytes_per_token: int | None
    """Of weights that a decoded token reads, as stored; None for what was there already."""
    export_seconds: float
    """CPU time."""

    def __str__(self) -> str:
        read = f", {self.bytes_per_token / 1e6:.0f} MB/token" if self.bytes_per_token else ""
        return (
            f"{self.name}: KL {self.kl:.4f} (99.9%: {self.kl_p999:.3f}), top-1 {self.top1:.1%}, ppl "
            f"{self.perplexity:.3f} (reference {self.reference_perplexity:.3f}), {self.disk_bytes / 1e6:.0f} MB{read}, "
            f"{self.tokens} tokens, export {self.export_seconds:.0f} s CPU"
        )


def reference_logits(checkpoint: Checkpoint, windows: Windows, cache: Path) -> list[Array]:
    """Of the float32 graph, window by window; mapped from files in ``cache`` where they were computed before."""
    digest = hashlib.sha256(windows.ids.tobytes() + repr(sorted(checkpoint.tensors.items())).encode())
    digest.update(checkpoint.rows("model.embed_tokens.weight", 0, 64).tobytes())
    folder = cache / f"reference-{digest.hexdigest()[:16]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            (graph_folder := Path(scratch) / "graph").mkdir()
            (files := Path(scratch) / "logits").mkdir()
            graph = build_graph(checkpoint, graph_folder, recipe_named("fp32"), progress=Silent())
            for number, logits in enumerate(windows.logits(graph.model, graph_folder)):
                np.save(files / f"{number:03}.npy", logits)
            files.rename(folder)
    return [np.load(path, mmap_mode="r") for path in sorted(folder.iterdir())]


def changed(spec: str) -> Recipe:
    """The recipe that ``NAME:tensors=BITSxBLOCK,...`` describes."""
    name, _, changes = spec.partition(":")
    recipe = recipe_named(name)
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        recipe = _change(recipe, key, value)
    return recipe


def _change(recipe: Recipe, key: str, value: str) -> Recipe:
    if value == "none":
        # No kernel reads whole rows of 6 bits.
        assert isinstance(recipe.table, Blockwise)
        return replace(recipe, head=None, table=replace(recipe.table, bits=8))
    if key == "head":
        return replace(recipe, head=TwoStage(candidates=int(value)))
    bits, _, block = value.removesuffix("s").partition("x")
    form = Blockwise(bits=int(bits), block=int(block), symmetric=value.endswith("s"))
    if key == "table":
        return replace(recipe, table=form)
    forms: dict[str, Format | None] = {"down": form, "outer_down": None} if key == "down" else {key: form}
    layers = {name: getattr(recipe, name) for name in ("layer", "narrow", "narrow_calibrated")}
    return replace(recipe, **{name: layer and replace(layer, **forms) for name, layer in layers.items()})


def measure(
    name: str,
    checkpoint: Checkpoint,
    reference: Sequence[Array],
    windows: Windows,
    *,
    scratch: Path,
    calibration: CalibrationText | None,
) -> Result:
    """Compare a bundle's folder, what llama.cpp made of the checkpoint, or what a recipe makes of it."""
    started = time.process_time()
    candidate = _candidate(Path(name), checkpoint, scratch, calibration)
    seconds = time.process_time() - started
    quality = compare(reference, windows.logits(candidate.model, candidate.folder), windows)
    return Result(
        name=name,
        **asdict(quality),
        disk_bytes=candidate.disk_bytes,
        bytes_per_token=candidate.bytes_per_token,
        export_seconds=seconds,
    )


@dataclass(frozen=True)
class _Candidate:
    """A graph, its files' folder, and the sizes of :class:`Result`."""

    model: ir.Model
    folder: Path
    disk_bytes: int
    bytes_per_token: int | None = None


def _candidate(path: Path, checkpoint: Checkpoint, scratch: Path, calibration: CalibrationText | None) -> _Candidate:
    if path.is_dir():
        return _Candidate(ir.load(path / GRAPH), path, (path / WEIGHTS).stat().st_size)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    if path.suffix == ".gguf":
        with open_checkpoint(path) as peer:
            model = build_graph(peer, folder, recipe_named("fp32"), progress=Silent()).model
            stored = [cast("StoredTensor", peer.stored(name)) for name in peer.tensors]
        return _Candidate(model, folder, sum(each.info.shape[0] * each.row_bytes for each in stored))
    graph = build_graph(checkpoint, folder, changed(str(path)), progress=Silent(), calibration=calibration)
    return _Candidate(graph.model, folder, (folder / WEIGHTS).stat().st_size, graph.weight_bytes_per_token)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", help="[default: kv_quality.txt]; repeatable")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a window")
    parser.add_argument("--cache", type=Path, help="keeps the reference's logits [default: nothing is kept]")
    parser.add_argument("--calibrate", metavar="FILE", help="round by GPTQ for this text, or built-in")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("what", nargs="+", help="a recipe, a bundle's folder, or a GGUF")
    args = parser.parse_args()
    texts = [path.read_text(encoding="utf-8") for path in args.text or [Path(__file__).with_name("kv_quality.txt")]]
    with tempfile.TemporaryDirectory() as scratch, open_checkpoint(args.checkpoint) as opened:
        checkpoint = cast("Checkpoint", Dithered(opened))
        tokenizer = Tokenizer.from_str(opened.tokenizer_json().decode())
        windows = Windows.of(texts, tokenizer, args.windows, args.tokens)
        calibration = CalibrationText.open(args.calibrate) if args.calibrate else None
        cache = args.cache or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        reference = reference_logits(checkpoint, windows, cache)
        for what in args.what:
            with tempfile.TemporaryDirectory(dir=scratch) as own:
                result = measure(what, checkpoint, reference, windows, scratch=Path(own), calibration=calibration)
            print(json.dumps(asdict(result)) if args.json else result, flush=True)


if __name__ == "__main__":
    main()
