"""The measuring tool itself: the dithered reference, and that it tells good recipes from bad ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from tokenizers import Tokenizer

from export.calibration import BUILT_IN, CalibrationText
from export.checkpoint import Checkpoint, StoredTensor, TensorInfo, open_checkpoint
from export.files import WeightFile
from export.quantize.recipes import RECIPES, Blockwise, TwoStage
from export.report import Windows
from tests.bench.dither import _CODES, Dithered, write_gguf
from tests.bench.divergence import changed, measure, reference_logits
from tests.export import tiny

NAME = "model.layers.0.mlp.up_proj.weight"


@dataclass
class Stored:
    """A checkpoint of one tensor."""

    tensor: StoredTensor

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {NAME: self.tensor.info}

    def stored(self, _: str) -> StoredTensor:
        return self.tensor

    def rows(self, _: str, start: int, stop: int) -> NDArray[np.float32]:
        return self.tensor.rows(start, stop)


@pytest.mark.parametrize("kind", _CODES)
def test_noise_is_half_a_step_of_the_grid(kind: str, tmp_path: Path) -> None:
    """Values on a grid, less one of them in the same run of 16, are whole numbers of steps."""
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = np.random.default_rng(4).integers(0, 256, (6, 2 * size), dtype=np.uint8)
    # Float16 scales with small exponents, wherever they stand in a block.
    for place in {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(kind, (0,)):
        raw.reshape(-1, size)[:, place + 1] = 0x1C
    (tmp_path / "weights").write_bytes(raw.tobytes())
    file = WeightFile.open(tmp_path / "weights")

    def decode(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        return gguf.dequantize(rows, Kind[kind])

    stored = Stored(StoredTensor(TensorInfo((6, 2 * block), kind), file, 0, 2 * size, decode))
    dithered = Dithered(cast("Checkpoint", stored))
    plain, noisy = stored.rows(NAME, 0, 6), dithered.rows(NAME, 0, 6)
    steps = dithered._steps(NAME, kind, 0, 6).astype(np.float64)
    runs = plain.reshape(6, -1, 16).astype(np.float64)
    multiples = (runs - runs[:, :, :1]) / np.maximum(steps.reshape(runs.shape), 1e-30)
    np.testing.assert_allclose(multiples, np.rint(multiples), atol=2e-2)
    share = np.abs(noisy - plain)[steps > 0] / steps[steps > 0]
    assert 0.4 < share.max() <= 0.501
    # However the rows are read.
    np.testing.assert_array_equal(noisy[2:5], dithered.rows(NAME, 2, 5))
    file.close()


def test_floats_get_no_noise(tmp_path: Path) -> None:
    with open_checkpoint(tiny.write_folder(tmp_path / "m", tiny.qwen2_config())) as checkpoint:
        rows = Dithered(checkpoint).rows(NAME, 3, 9)
        np.testing.assert_array_equal(rows, checkpoint.rows(NAME, 3, 9))


def test_the_reference_has_no_divergence_and_eight_bits_have_less_than_four(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.qwen2_config(), kind=Kind.Q8_0)
    with open_checkpoint(path) as opened:
        checkpoint = cast("Checkpoint", Dithered(opened))
        tokenizer = Tokenizer.from_str(opened.tokenizer_json().decode())
        windows = Windows.of([CalibrationText.open(BUILT_IN).text[:3000]], tokenizer, 2, 64)
        reference = reference_logits(checkpoint, windows, tmp_path)
        found: dict[str, Any] = {
            name: measure(name, checkpoint, reference, windows, scratch=tmp_path, calibration=None)
            for name in ("fp32", "quality", "balanced:head=none", str(path))
        }
        # Kept for the next call.
        again = reference_logits(checkpoint, windows, tmp_path)
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(reference))
    assert found["fp32"].kl == pytest.approx(0, abs=1e-6)
    assert found["fp32"].perplexity == pytest.approx(found["fp32"].reference_perplexity)
    assert found["fp32"].kl < found["quality"].kl < found["balanced:head=none"].kl
    # The file without its noise is a peer of eight bits.
    assert found["fp32"].kl < found[str(path)].kl < found["balanced:head=none"].kl
    assert found[str(path)].disk_bytes < path.stat().st_size < found["fp32"].disk_bytes
    assert {result.tokens for result in found.values()} == {64}


def test_what_llama_cpp_gets_has_the_noise_and_the_metadata(tmp_path: Path) -> None:
    source = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.qwen2_config(), kind=Kind.Q8_0)
    write_gguf(source, tmp_path / "dithered.gguf")
    with open_checkpoint(source) as plain, open_checkpoint(tmp_path / "dithered.gguf") as written:
        assert {info.dtype for info in written.tensors.values()} == {"F32"}
        assert written.tensors.keys() == plain.tensors.keys()
        for name in written.tensors:
            np.testing.assert_array_equal(written.rows(name), Dithered(plain).rows(name))
        assert not np.array_equal(written.rows(NAME), plain.rows(NAME))
        assert written.config == plain.config
        assert written.tokenizer_json() == plain.tokenizer_json()
        assert written.chat_template() == plain.chat_template()


def test_recipes_can_be_changed() -> None:
    recipe = changed("balanced:down=4x32,qkv=8x32s,table=4x64,head=32")
    for layer in (recipe.layer, *(recipe.fitted(64, is_calibrated=calibrated).layer for calibrated in (True, False))):
        assert {layer.down_of(number, 4) for number in range(4)} == {Blockwise(4, 32)}
        assert layer.gate_up == RECIPES["balanced"].layer.gate_up
        assert layer.qkv == Blockwise(8, 32, symmetric=True)
    assert (recipe.table, recipe.head) == (Blockwise(4, 64), TwoStage(32))
    assert changed("balanced:head=none").head is None
    outer = changed("small:outer_down=8x32s").layer
    assert [outer.down_of(number, 4).bits for number in range(4)] == [8, 4, 4, 8]
    assert changed("small") is RECIPES["small"]
    assert changed("fast:down=4x32").narrow is None
