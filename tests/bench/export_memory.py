"""Peak memory and time of `qwedge export`: the real 0.5B, and a checkpoint with the shapes of Qwen2.5-7B.

    .venv/bin/python -m tests.bench.export_memory

The 7B is made on the spot: sharded bf16 safetensors with the published shapes, filled with one block of random numbers
over and over, and the tokenizer of the demo model. It needs 21 GB in the temporary folder (TMPDIR) while it runs.
Prints one line per export and a JSON object at the end; exits with 1 when a target is missed.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from export.architectures import architecture_for
from export.progress import Silent
from export.sources import default_cache, resolve

DEMO = "qwen2.5-coder-0.5b-instruct"
QWEN25_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "eos_token_id": 151_645,
}
SHARD_BYTES = 4 << 30
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Result:
    """One export."""

    name: str
    source_bytes: int
    bundle_bytes: int
    peak_rss_mb: float
    """Largest resident set in 10^6 bytes, mapped files included."""
    target_mb: float
    seconds: float
    phases: dict[str, float]


def measure(name: str, source: str, destination: Path, *, source_bytes: int, target_mb: float) -> Result:
    """Run the command as a user does and read its peak from the kernel."""
    line = [sys.executable, "-m", "edge.cli", "export", source, "-o", str(destination), "--offline", "--json"]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(line, stdout=output) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        if process.returncode:
            raise SystemExit(f"the export of {name} failed with status {process.returncode}")
        output.seek(0)
        report = json.load(output)
    # The kernel counts in KiB.
    result = Result(
        name, source_bytes, report["bytes"], usage.ru_maxrss * 1024 / 1e6, target_mb, seconds, report["seconds"]
    )
    print(f"{name:<28} {result.peak_rss_mb:>6,.0f} MB peak (target {target_mb:,.0f}), {seconds:.1f} s, {result.phases}")
    return result


def write_checkpoint(folder: Path, config: Mapping[str, Any], tokenizer: bytes) -> int:
    """A folder with the tensors that ``config`` asks for; returns the bytes of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(tokenizer)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in architecture_for(config).tensors().items():
        if sum(map(_num_bytes, shards[-1].values())) + _num_bytes(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map: dict[str, str] = {}
    values = np.random.default_rng(0).normal(0.0, 0.02, BLOCK_BYTES // 2).astype(np.float32)
    block = memoryview((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            _write_shard(file, shapes, block)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(_num_bytes(shape) for shapes in shards for shape in shapes.values())


def _write_shard(file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], block: memoryview) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + _num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    file.write(struct.pack("<Q", len(text)) + text)
    while offset:
        offset -= file.write(block[:offset])


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def main() -> None:
    demo = resolve(DEMO, cache=default_cache(), progress=Silent())
    with tempfile.TemporaryDirectory() as scratch, demo.open() as checkpoint:
        folder = Path(scratch)
        small = measure(DEMO, DEMO, folder / "small", source_bytes=checkpoint.num_file_bytes, target_mb=500)
        num_bytes = write_checkpoint(folder / "7b", QWEN25_7B, checkpoint.tokenizer_json())
        large = measure(
            "shapes of Qwen2.5-7B", str(folder / "7b"), folder / "large", source_bytes=num_bytes, target_mb=1000
        )
    results = [small, large]
    passed = all(result.peak_rss_mb <= result.target_mb for result in results)
    print(json.dumps({"passed": passed, "exports": [asdict(result) for result in results]}))
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
