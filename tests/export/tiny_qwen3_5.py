"""Tiny random Qwen3.5 checkpoints: the shapes and the weights that :mod:`tests.export.tiny` writes into folders.

    folder = tiny.write_folder(tmp_path / "m", tiny_qwen3_5.config(linear_num_value_heads=4))

All layer types, with the awkward facts of the real models: the text part stands inside a model that sees, beside vision
and multi-token prediction; a quarter of each head is rotated; the eos of the config is not the one that ends a turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

EOS_TEXT = 264
"""<|endoftext|> of the tiny tokenizer."""
REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of the published tokenizer."""
_VISION = {"model.visual.patch_embed.proj.weight": (8, 3), "model.visual.blocks.0.norm1.weight": (8,)}
Shapes = dict[str, tuple[int, ...]]


def text_config(**changes: Any) -> dict[str, Any]:
    """config.json of the text alone (``Qwen3_5ForCausalLM``); ``changes`` replace keys."""
    config = {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": EOS_TEXT,
        "full_attention_interval": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 32,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 256,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 288,
    }
    return {**config, **changes}


def config(**changes: Any) -> dict[str, Any]:
    """config.json of a model that sees (``Qwen3_5ForConditionalGeneration``); ``changes`` replace keys of its text."""
    text = text_config(**changes)
    del text["architectures"]
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": 280,
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": {"model_type": "qwen3_5", "depth": 1, "hidden_size": 8},
    }


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of a checkpoint with this config, under the names that it has in the files."""
    text = config.get("text_config", config)
    prefix = "model.language_model." if "text_config" in config else "model."
    table = (text["vocab_size"], text["hidden_size"])
    found: Shapes = {f"{prefix}embed_tokens.weight": table, f"{prefix}norm.weight": (text["hidden_size"],)}
    for layer, kind in enumerate(text["layer_types"]):
        block = _full(text) if kind == "full_attention" else _linear(text)
        found |= {f"{prefix}layers.{layer}.{name}": shape for name, shape in (block | _mlp(text)).items()}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = table
    return found | _beside(text) | (_VISION if "text_config" in config else {})


def random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Weights that give every part of a layer something to do: decays from slow to fast, gates from shut to open."""
    values = rng.normal(0.0, 0.12, shape)
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.05, 4.0, shape))
    if name.endswith("dt_bias"):
        return rng.normal(0.0, 1.0, shape)
    if name.endswith("conv1d.weight"):
        return rng.normal(0.0, 0.5, shape)
    # All other norms multiply by 1 + weight.
    return values + 1.0 if name.endswith("linear_attn.norm.weight") else values


def as_llama_cpp(config: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Weights as llama.cpp's converter changes them before it writes a GGUF, under its names of linear attention.

    Written from its description (https://github.com/ggml-org/llama.cpp/pull/19468), head by head. Multi-token
    prediction gets its new names (``enorm``, ``hnorm``) before norms are told by theirs.
    """
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    per_key = value_heads // key_heads
    tiled = [key * per_key + turn for turn in range(per_key) for key in range(key_heads)]
    keys = 2 * key_heads * config["linear_key_head_dim"]

    def tile(values: NDArray[np.float32]) -> NDArray[np.float32]:
        heads = np.split(values, value_heads)
        return np.concatenate([heads[head] for head in tiled])

    def change(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        part = name.partition("linear_attn.")[2]
        if (name.endswith("norm.weight") and part != "norm.weight") or "pre_fc_norm" in name:
            return values + np.float32(1.0)
        if part in ("in_proj_qkv.weight", "conv1d.weight"):
            values = np.concatenate([values[:keys], tile(values[keys:])])
            return values[:, 0, :] if values.ndim == 3 else values
        if part == "out_proj.weight":
            return np.ascontiguousarray(tile(values.T).T)
        if part == "A_log":
            return tile(-np.exp(values))
        return tile(values) if part and part != "norm.weight" else values

    return {_llama_name(name, config["num_hidden_layers"]): change(name, values) for name, values in tensors.items()}


def _llama_name(name: str, num_layers: int) -> str:
    """Multi-token prediction becomes a layer behind the others."""
    name = name.replace("mtp.layers.0.", f"model.layers.{num_layers}.").replace("dt_bias", "dt_proj.bias")
    parts = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm"}
    parts["norm"] = "shared_head_norm"
    return re.sub(r"mtp\.(\w+)", lambda match: f"blk.{num_layers}.nextn.{parts[match[1]]}", name)


def _full(text: Mapping[str, Any]) -> Shapes:
    hidden, head = text["hidden_size"], text["head_dim"]
    q, kv = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    return {
        "self_attn.q_proj.weight": (2 * q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
    }


def _linear(text: Mapping[str, Any]) -> Shapes:
    hidden, heads = text["hidden_size"], text["linear_num_value_heads"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = heads * text["linear_value_head_dim"]
    return {
        "linear_attn.in_proj_qkv.weight": (2 * keys + values, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, text["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (text["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def _mlp(text: Mapping[str, Any]) -> Shapes:
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


def _beside(text: Mapping[str, Any]) -> Shapes:
    """Multi-token prediction: one layer of full attention over two hidden states."""
    hidden = text["hidden_size"]
    norms = ("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.norm.weight")
    layer = {f"mtp.layers.0.{name}": shape for name, shape in (_full(text) | _mlp(text)).items()}
    return {"mtp.fc.weight": (hidden, 2 * hidden), **dict.fromkeys(norms, (hidden,)), **layer}
