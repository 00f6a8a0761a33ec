"""The engine on real onnxruntime: tiny random models, exported by the product's own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from edge.bundle import GRAPH, KVLayout, Manifest, read_manifest
from edge.engine.engine import Engine
from edge.engine.kv_cache import KVPool
from edge.errors import BundleError, ConfigError
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.export import tiny

CONTEXT = 96


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 bundle: batching and chunking must agree to rounding."""
    folder = tmp_path_factory.mktemp(request.param)
    config = {"qwen2": tiny.qwen2_config, "qwen3": tiny.qwen3_config}[request.param]()
    checkpoint = open_checkpoint(tiny.write_folder(folder / "checkpoint", config))
    with checkpoint:
        export_bundle(checkpoint, folder / "bundle", RECIPES["fp32"], progress=Silent())
    return folder / "bundle"


@pytest.fixture
def engine(bundle: Path) -> Engine:
    return Engine(bundle, read_manifest(bundle), slots=4, context=CONTEXT, threads=1, prefill_chunk=16)


def prompt(length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, tiny.NUM_IDS, length)


def feed(engine: Engine, row: int, ids: NDArray[np.int64], sizes: list[int]) -> NDArray[np.float32]:
    """Prefill ``ids`` in pieces of the given sizes and return the last logits."""
    past = 0
    for size in sizes:
        logits = engine.prefill(row, ids[past : past + size], past)
        past += size
    assert past == len(ids)
    return logits.copy()


def generate(engine: Engine, ids: NDArray[np.int64], count: int) -> list[int]:
    """Greedy tokens of one sequence alone in row 0."""
    sizes = [min(16, len(ids) - start) for start in range(0, len(ids), 16)]
    tokens = [int(feed(engine, 0, ids, sizes).argmax())]
    while len(tokens) < count:
        tokens.append(int(engine.decode([tokens[-1]], [len(ids) + len(tokens) - 1])[0].argmax()))
    return tokens


def test_chunked_prefill_gives_the_logits_of_one_prefill(engine: Engine) -> None:
    ids = prompt(16)
    whole = feed(engine, 0, ids, [16])
    for sizes in ([1, 15], [5, 5, 6], [15, 1]):
        np.testing.assert_allclose(feed(engine, 0, ids, sizes), whole, atol=1e-5)


def test_decode_gives_the_logits_of_prefill(engine: Engine) -> None:
    ids = prompt(12)
    whole = feed(engine, 0, ids, [12])
    feed(engine, 0, ids[:9], [9])
    for past in range(9, 12):
        logits = engine.decode([int(ids[past])], [past])
    np.testing.assert_allclose(logits[0], whole, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate((3, 16, 9, 1))]
    alone = [generate(engine, ids, 8) for ids in prompts]
    tokens = [[int(feed(engine, row, ids, [len(ids)]).argmax())] for row, ids in enumerate(prompts)]
    for step in range(7):
        past = [len(ids) + step for ids in prompts]
        logits = engine.decode([row[-1] for row in tokens], past)
        for row, values in zip(tokens, logits, strict=True):
            row.append(int(values.argmax()))
    assert tokens == alone


def test_prefill_of_one_row_leaves_the_others_alone(engine: Engine) -> None:
    first, second = prompt(10, 1), prompt(14, 2)
    feed(engine, 0, first, [10])
    expected = engine.decode([7], [10]).copy()
    feed(engine, 0, first, [10])
    feed(engine, 1, second, [14])
    np.testing.assert_array_equal(engine.decode([7], [10]), expected)


def test_a_moved_row_goes_on_as_before(engine: Engine) -> None:
    ids = prompt(11, 3)
    feed(engine, 0, ids, [11])
    expected = engine.decode([5], [11]).copy()
    feed(engine, 2, ids, [11])
    engine.move_row(2, 0, 11)
    np.testing.assert_allclose(engine.decode([5], [11]), expected, atol=1e-6)


def test_a_used_row_starts_afresh(engine: Engine) -> None:
    expected = generate(engine, prompt(6, 4), 5)
    feed(engine, 0, prompt(16, 5), [16])
    engine.release_row(0)
    assert generate(engine, prompt(6, 4), 5) == expected
    feed(engine, 0, prompt(16, 5), [16])
    # Without a release the old tokens lie beyond the new length, where nothing may look.
    assert generate(engine, prompt(6, 4), 5) == expected


def test_the_context_can_be_filled_to_the_last_token(engine: Engine) -> None:
    tokens = generate(engine, prompt(16), CONTEXT - 16)
    assert len(tokens) == CONTEXT - 16
    assert all(0 <= token < engine.manifest.padded_vocab_size for token in tokens)


def test_a_graph_that_onnxruntime_refuses_is_a_bundle_error(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / GRAPH).write_bytes((bundle / GRAPH).read_bytes()[:200])
    with pytest.raises(BundleError, match="onnxruntime cannot load"):
        Engine(tmp_path, read_manifest(bundle), slots=1, context=32)


def test_the_pool_takes_memory_only_for_tokens_that_are_in_it() -> None:
    layout = KVLayout(layers=8, kv_heads=4, head_dim=64)
    process = psutil.Process()
    before = process.memory_info().rss
    pool = KVPool(layout, slots=8, context=32768)  # 4 GiB of address space
    assert process.memory_info().rss - before < 8 << 20
    for layer in range(layout.layers):
        pool.keys(layer, 3, 1)[:, :, :2048] = 1
        pool.values(layer, 3, 1)[:, :, :2048] = 1
    filled = process.memory_info().rss - before
    assert filled == pytest.approx(2048 * layout.bytes_per_token, rel=0.2)
    pool.release(3)
    assert process.memory_info().rss - before < 8 << 20
    assert not pool.keys(0, 3, 1)[0, 0, 0].any()


def test_a_pool_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot reserve"):
        KVPool(KVLayout(layers=4096, kv_heads=4096, head_dim=4096), slots=4096, context=1 << 30)


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_how_a_prompt_is_cut_does_not_change_one_bit(recipe: str, tmp_path: Path) -> None:
    with open_checkpoint(tiny.write_folder(tmp_path / "checkpoint", tiny.qwen2_config())) as checkpoint:
        manifest = export_bundle(checkpoint, tmp_path / "bundle", RECIPES[recipe], progress=Silent()).manifest
    engine = Engine(tmp_path / "bundle", manifest, slots=1, context=64, threads=1, prefill_chunk=64)
    ids = prompt(24)
    whole = feed(engine, 0, ids, [24])
    # Chunks of two tokens and more; a single token goes through other kernels.
    for sizes in ([12, 12], [22, 2], [2] * 12, [3, 7, 14]):
        np.testing.assert_array_equal(feed(engine, 0, ids, sizes), whole)


def test_verify_gives_the_logits_of_every_position(engine: Engine) -> None:
    ids = prompt(14, 6)
    expected = [feed(engine, 0, ids[:length], [length]) for length in range(11, 15)]
    feed(engine, 0, ids[:10], [10])
    logits = engine.verify(0, ids[10:], 10)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    # Wrong guesses are overwritten by what really comes.
    engine.verify(0, prompt(4, 9), 10)
    np.testing.assert_allclose(engine.verify(0, ids[10:], 10), expected, atol=1e-5)


def test_quantized_and_float_bundles_have_the_same_interface(tmp_path: Path) -> None:
    with open_checkpoint(tiny.write_folder(tmp_path / "checkpoint", tiny.qwen2_config())) as checkpoint:
        for recipe in RECIPES.values():
            folder = tmp_path / recipe.name
            manifest: Manifest = export_bundle(checkpoint, folder, recipe, progress=Silent()).manifest
            engine = Engine(folder, manifest, slots=2, context=64, threads=1)
            logits = engine.prefill(0, prompt(5), 0)
            assert logits.shape == (manifest.padded_vocab_size,)
            assert np.isfinite(logits).all()
