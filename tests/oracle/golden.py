"""Logits that transformers computed for tiny checkpoints, so that the ordinary tests can compare without torch.

`.venv-oracle/bin/python -m tests.oracle.golden` makes tests/data/golden/*.npz anew; `test_golden.py` checks that they
are what transformers says.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.export import tiny

FOLDER = Path(__file__).parents[1] / "data" / "golden"
SEED = 7
NUM_TOKENS = 24
EVERY = 9
"""Every ninth logit is kept: 32 of 288."""
CASES: dict[str, dict[str, Any]] = {
    "qwen2-tied": tiny.qwen2_config(),
    "qwen2-untied": tiny.qwen2_config(tie_word_embeddings=False, num_key_value_heads=4, rope_theta=10_000.0),
    "qwen3-tied": tiny.qwen3_config(num_key_value_heads=1),
    "qwen3-untied": tiny.qwen3_config(tie_word_embeddings=False, rms_norm_eps=1e-5),
}


def prompt() -> NDArray[np.int64]:
    """The tokens [NUM_TOKENS] that every case is asked about."""
    return np.arange(NUM_TOKENS, dtype=np.int64) * 11 % tiny.NUM_IDS


def read(case: str) -> NDArray[np.float32]:
    """The stored logits [NUM_TOKENS, 32]."""
    with np.load(FOLDER / f"{case}.npz") as stored:
        logits: NDArray[np.float32] = stored["logits"]
    return logits


def compute(case: str, scratch: Path) -> NDArray[np.float32]:
    """Ask transformers for the same."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    folder = tiny.write_folder(scratch / case, CASES[case], seed=SEED)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(prompt()[None])).logits[0].numpy()
    return logits[:, ::EVERY]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            np.savez_compressed(FOLDER / f"{case}.npz", logits=compute(case, Path(scratch)))


if __name__ == "__main__":
    main()
