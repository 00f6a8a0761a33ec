"""What quantized weights cost: next-token distributions of recipes and bundles against the checkpoint in float32.

    .venv/bin/python -m tests.bench.divergence --checkpoint model.gguf balanced small balanced:down=4x32

A GGUF holds weights that lie on a grid of llama.cpp's own; a recipe would be blamed for leaving it. So the reference is
a *dithered* checkpoint: uniform noise of half a step either way on every weight, from a seed, which no grid favours.
Recipes are exported from that same checkpoint. Checkpoints in floats get no noise.

A recipe may be changed: ``NAME:qkv=8x64s,out=8x64`` gives ``qkv``, ``value``, ``out``, ``gate_up``, ``down``,
``calibrated_down`` or ``table`` another format (bits, block, and ``s`` for a symmetric one), ``head=256`` another
number of candidates, and ``head=none`` takes the second stage away. The text is cut into windows, spread evenly over
each file; the second half of each is scored. Reference logits are kept in ``--cache``. Prints a line per result, or a
JSON object with ``--json``.
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
from typing import Any, cast
from zlib import crc32

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge.bundle import GRAPH, WEIGHTS
from export.calibration import CalibrationText
from export.checkpoint import Checkpoint, open_checkpoint
from export.pipeline import build_graph
from export.progress import Silent
from export.quantize.recipes import Blockwise, Recipe, TwoStage, recipe_named
from export.report import Windows, compare
from export.segments import Array

SEED = 1
_CODES: dict[str, list[tuple[int, int, int]]] = {
    "Q4_0": [(2, 18, 0x11)],
    "Q4_1": [(4, 20, 0x11)],
    "Q5_0": [(2, 6, 0), (6, 22, 0x11)],
    "Q5_1": [(4, 8, 0), (8, 24, 0x11)],
    "Q8_0": [(2, 34, 1)],
    "Q4_K": [(16, 144, 0x11)],
    "Q5_K": [(16, 48, 0), (48, 176, 0x11)],
    "Q6_K": [(0, 128, 0x11), (128, 192, 0)],
}
"""Bytes of a GGUF block that hold codes, and what makes every code one: the last range is also the block's end, less
scales that follow it."""
_BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


class Dithered:
    """A checkpoint with noise of half a step on every weight; otherwise that checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """As :meth:`Checkpoint.rows`; the same rows get the same noise however they are read."""
        rows = self._checkpoint.rows(name, start, stop)
        dtype = self._checkpoint.tensors[name].dtype
        if dtype in {"F32", "F16", "BF16"}:
            return rows
        # One counter makes four numbers; all widths of blocks are multiples of that.
        generator = np.random.Philox(key=crc32(name.encode()) + (SEED << 32)).advance(start * rows.shape[1] // 4)
        noise = np.random.Generator(generator).random(rows.shape) - 0.5
        return (rows + self._steps(name, dtype, start, len(rows)) * noise).astype(np.float32)

    def _steps(self, name: str, dtype: str, start: int, count: int) -> NDArray[np.float32]:
        """The step of the grid at each weight: the value of code one less that of code zero."""
        tensor = self._checkpoint._stored[name]
        raw = np.array(tensor.file.read(tensor.offset + start * tensor.row_bytes, count * tensor.row_bytes))
        blocks = raw.reshape(-1, _BLOCK_BYTES[dtype])
        values = []
        for number in (0, 1):
            for begin, end, ones in _CODES[dtype]:
                blocks[:, begin:end] = number * ones
            values.append(tensor.decode(blocks.reshape(count, -1)).reshape(count, -1))
        steps: NDArray[np.float32] = np.abs(values[1] - values[0])
        return steps


@dataclass(frozen=True)
class Result:
    """One recipe or bundle against the reference."""

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
    """Of weights that a decoded token reads, as stored; None for a bundle."""
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
        return replace(recipe, head=None)
    if key == "head":
        return replace(recipe, head=TwoStage(candidates=int(value)))
    bits, _, block = value.removesuffix("s").partition("x")
    form = Blockwise(bits=int(bits), block=int(block), symmetric=value.endswith("s"))
    if key == "table":
        return replace(recipe, table=form)
    if key == "calibrated_down":
        return replace(recipe, calibrated_down=form)
    return replace(recipe, layer=replace(recipe.layer, **{key: form}))


def measure(
    name: str,
    checkpoint: Checkpoint,
    reference: Sequence[Array],
    windows: Windows,
    *,
    scratch: Path,
    calibration: CalibrationText | None,
) -> Result:
    """Compare a bundle's folder, or what a recipe makes of the checkpoint."""
    started, read = time.process_time(), None
    if (folder := Path(name)).is_dir():
        model = ir.load(folder / GRAPH)
    else:
        folder = Path(tempfile.mkdtemp(dir=scratch))
        graph = build_graph(checkpoint, folder, changed(name), progress=Silent(), calibration=calibration)
        model, read = graph.model, graph.weight_bytes_per_token
    seconds = time.process_time() - started
    quality = compare(reference, windows.logits(model, folder), windows)
    return Result(
        name=name,
        **asdict(quality),
        disk_bytes=(folder / WEIGHTS).stat().st_size,
        bytes_per_token=read,
        export_seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", help="[default: kv_quality.txt]; repeatable")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a window")
    parser.add_argument("--cache", type=Path, help="keeps the reference's logits [default: nothing is kept]")
    parser.add_argument("--calibrate", metavar="FILE", help="round by GPTQ for this text, or built-in")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("what", nargs="+", help="a bundle's folder, or a recipe")
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
