"""Logits that transformers computed for tiny Qwen3.5 checkpoints, so that the ordinary tests can compare without torch.

transformers 5 cannot share an environment with the optimum that the other oracle tests need. So these are made once, in
an environment of their own (any place will do), and hold the versions that made them:

    python -m venv hf5 && hf5/bin/pip install torch==2.13.0 transformers==5.23.0 gguf
    PYTHONPATH=. hf5/bin/python -m tests.oracle.golden_qwen3_5
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.export import tiny, tiny_qwen3_5

FOLDER = Path(__file__).parents[1] / "data" / "golden"
SEED = 13
NUM_PROMPTS, NUM_TOKENS = 3, 72
"""More tokens than a chunk of transformers' prefill has, 64."""
EVERY = 9
"""Every ninth logit is kept: 32 of 288."""
_LINEAR, _FULL = "linear_attention", "full_attention"
CASES: dict[str, dict[str, Any]] = {
    # Changes of the text's config. Real models have 16 key heads, and 16 or 32 value heads.
    "equal-heads": {},
    "grouped-heads": {"linear_num_value_heads": 4, "tie_word_embeddings": False},
    "other-order": {
        "layer_types": [_FULL, _LINEAR, _LINEAR, _FULL, _LINEAR],
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "linear_conv_kernel_dim": 3,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
        "rms_norm_eps": 1e-4,
    },
    "half-rotated": {
        "head_dim": 32,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10_000.0, "rope_type": "default"},
    },
}


def prompts() -> NDArray[np.int64]:
    """The tokens [NUM_PROMPTS, NUM_TOKENS] that every case is asked about."""
    return np.arange(NUM_PROMPTS * NUM_TOKENS, dtype=np.int64).reshape(NUM_PROMPTS, NUM_TOKENS) * 11 % tiny.NUM_IDS


def read(case: str) -> NDArray[np.float32]:
    """The stored logits [NUM_PROMPTS, NUM_TOKENS, 32]."""
    with np.load(FOLDER / f"qwen3_5-{case}.npz") as stored:
        logits: NDArray[np.float32] = stored["logits"]
    return logits


def compute(case: str, scratch: Path) -> NDArray[np.float32]:
    """Ask transformers for the same."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    folder = tiny.write_folder(scratch / case, tiny_qwen3_5.text_config(**CASES[case]), seed=SEED)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(prompts())).logits.numpy()
    return logits[..., ::EVERY]


def main() -> None:
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", "numpy")}
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            logits = compute(case, Path(scratch))
            np.savez_compressed(FOLDER / f"qwen3_5-{case}.npz", logits=logits, versions=np.array(str(versions)))


if __name__ == "__main__":
    main()
