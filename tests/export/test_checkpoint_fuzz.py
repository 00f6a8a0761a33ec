"""Damaged headers: whatever the bytes, a checkpoint opens or raises CheckpointError, quickly and in little memory."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind

from edge.errors import CheckpointError
from export.checkpoint import open_checkpoint
from tests.export import packed, tiny, tiny_qwen3_5

NUM_CASES = 300
MAX_SECONDS = 2.0
MAX_BYTES = 16 << 20


def flip(content: bytearray, rng: random.Random, limit: int) -> None:
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(limit)] ^= 1 << rng.randrange(8)


def overwrite(content: bytearray, rng: random.Random, limit: int) -> None:
    place = rng.randrange(limit)
    content[place : place + 8] = rng.choice([b"\xff" * 8, bytes(8), rng.randbytes(8), (1 << 62).to_bytes(8, "little")])


def cut_out(content: bytearray, rng: random.Random, limit: int) -> None:
    place = rng.randrange(limit)
    del content[place : place + rng.randint(1, 64)]


def repeat(content: bytearray, rng: random.Random, limit: int) -> None:
    place = rng.randrange(limit)
    content[place:place] = content[place : place + rng.randint(1, 64)]


def truncate(content: bytearray, rng: random.Random, limit: int) -> None:
    del content[rng.randrange(limit) :]


DAMAGES = [flip, overwrite, cut_out, repeat, truncate]


def attack(target: Path, checkpoint: Path, header_bytes: int, seed: int) -> int:
    """Damage ``target`` again and again, open ``checkpoint`` and read it; returns how often that was refused."""
    good, rng, refused = target.read_bytes(), random.Random(seed), 0
    for case in range(NUM_CASES):
        content = bytearray(good)
        damage: Callable[[bytearray, random.Random, int], None] = DAMAGES[case % len(DAMAGES)]
        damage(content, rng, header_bytes)
        target.write_bytes(content)
        began = time.monotonic()
        try:
            with open_checkpoint(checkpoint) as opened:
                for name, info in opened.tensors.items():
                    opened.rows(name, 0, min(4, info.shape[0]))
        except CheckpointError:
            refused += 1
        assert time.monotonic() - began < MAX_SECONDS, f"case {case} of seed {seed}"
    return refused


@pytest.fixture(autouse=True)
def _little_memory() -> object:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_BYTES


@pytest.mark.parametrize("seed", [1, 2])
def test_safetensors_headers(tmp_path: Path, seed: int) -> None:
    folder = tiny.write_folder(tmp_path / "m", tiny.qwen2_config(num_hidden_layers=1))
    weights = folder / "model.safetensors"
    header_bytes = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert attack(weights, folder, header_bytes, seed) > NUM_CASES // 2


@pytest.mark.parametrize(("kind", "seed"), [(Kind.Q8_0, 3), (Kind.Q4_0, 4), (Kind.BF16, 5)])
def test_gguf_headers(tmp_path: Path, kind: Kind, seed: int) -> None:
    config = tiny.qwen3_config(num_hidden_layers=1)
    path = tiny.write_gguf(tmp_path / "m.gguf", config, kind=kind, head_kind=Kind.Q8_0)
    header_bytes = path.read_bytes().index(b"output_norm.weight") + 40
    assert attack(path, path, header_bytes, seed) > NUM_CASES // 4


def test_gguf_headers_with_linear_attention(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny_qwen3_5.text_config(linear_num_value_heads=4), kind=Kind.Q8_0)
    header_bytes = path.read_bytes().index(b"tokenizer.ggml.tokens")
    assert attack(path, path, header_bytes, 6) > NUM_CASES // 4


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 48]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
QUANTIZED: dict[str, Callable[[Path, dict[str, Any]], packed.Model]] = {
    "gptq": partial(packed.write_folder, write=packed.gptq, settings=GPTQ),
    "awq": partial(packed.write_folder, write=packed.awq, settings=AWQ),
    "compressed-tensors": partial(packed.write_folder, write=packed.compressed, settings=COMPRESSED),
    "fp8": partial(packed.write_fp8, settings=FP8),
}


@pytest.mark.parametrize(("method", "seed"), [(method, 7 + seed) for seed, method in enumerate(QUANTIZED)])
def test_headers_of_quantized_weights(tmp_path: Path, method: str, seed: int) -> None:
    QUANTIZED[method](tmp_path / "m", tiny.qwen2_config(num_hidden_layers=1))
    weights = tmp_path / "m" / "model.safetensors"
    header_bytes = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert attack(weights, tmp_path / "m", header_bytes, seed) > NUM_CASES // 2
    config = tmp_path / "m" / "config.json"
    attack(config, tmp_path / "m", len(config.read_bytes()), seed)


def test_side_files_of_a_folder(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "m", tiny.qwen2_config(num_hidden_layers=1), num_shards=2)
    for seed, name in enumerate(
        [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "model.safetensors.index.json",
        ]
    ):
        good = (folder / name).read_bytes()
        attack(folder / name, folder, len(good), seed)
        (folder / name).write_bytes(good)
