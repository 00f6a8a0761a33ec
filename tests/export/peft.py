"""LoRA adapters as PEFT saves them, with random values; no torch needed.

Layout: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.export.tiny import Tensors, write_safetensors

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "tiny",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


def adapter_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
    *,
    targets: Iterable[str] = ALL,
    layers: Iterable[int] | None = None,
    seed: int = 0,
) -> Tensors:
    """Random A [rank, in] and B [out, rank] for the matrices ``shapes`` (Hugging Face names, [out, in]) of a model."""
    rng, targets = np.random.default_rng(seed), set(targets)
    wanted = None if layers is None else set(layers)
    tensors: Tensors = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"(model\.layers\.(\d+)\.\w+\.(\w+))\.weight", name)
        if match and match[3] in targets and (wanted is None or int(match[2]) in wanted):
            a = rng.standard_normal((rank, shape[1]), dtype=np.float32) / np.float32(shape[1] ** 0.5)
            b = rng.standard_normal((shape[0], rank), dtype=np.float32) / np.float32(4 * rank**0.5)
            tensors[f"base_model.model.{match[1]}.lora_A.weight"] = a
            tensors[f"base_model.model.{match[1]}.lora_B.weight"] = b
    return tensors


def write_adapter(folder: Path, tensors: Tensors, *, dtype: str = "F32", **settings: Any) -> Path:
    """Write an adapter's folder; ``settings`` are those of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = next((len(tensor) for name, tensor in tensors.items() if "lora_A" in name), 1)
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {**CONFIG, "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "adapter_model.safetensors", tensors, dtype)
    return folder


def merge(weights: Tensors, adapter: Tensors, scale: float) -> Tensors:
    """A model's weights with an adapter added by the definition: W + scale * B A."""
    result = dict(weights)
    for name, a in adapter.items():
        if "lora_A" in name:
            b = adapter[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            result[target] = (weights[target] + scale * (b.astype(np.float64) @ a)).astype(np.float32)
    return result
