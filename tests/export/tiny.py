"""Tiny random Qwen2, Qwen3 and Qwen3.5 checkpoints, as a Hugging Face folder or as a GGUF; no torch needed.

    folder = write_folder(tmp_path / "m", qwen3_config(tie_word_embeddings=False), seed=1)

The shapes keep the awkward facts of the real models: head_dim of Qwen3 is not hidden/heads, the embedding table is
padded beyond the tokenizer's ids, grouped heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.export import tiny_qwen3_5

Tensors = dict[str, NDArray[np.float32]]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r"), ("Ġw", "or"), ("l", "d")]
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@cache
def vocab() -> dict[str, int]:
    """256 bytes, then what the merges make."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    return {token: index for index, token in enumerate(tokens)}


NUM_IDS = 256 + len(MERGES) + len(ADDED)
EOS, BOS = 256 + len(MERGES) + 2, 256 + len(MERGES)


@cache
def tokenizer_json(regex: str = QWEN2_REGEX) -> bytes:
    """The tokenizer, put together with the tokenizers library from its parts."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab(), merges=MERGES))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special="tool" not in text, normalized=False) for text in ADDED])
    return tokenizer.to_str().encode()


def tokenizer_for(config: Mapping[str, Any]) -> bytes:
    """The tokenizer that belongs to a config: the families cut text differently."""
    return tokenizer_json(tiny_qwen3_5.REGEX) if _is_qwen3_5(config) else tokenizer_json()


def qwen2_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Qwen2; ``changes`` replace keys."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 288,
    }
    return {**config, **changes}


def qwen3_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Qwen3; ``changes`` replace keys."""
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32, "attention_bias": False}
    return qwen2_config(**{**qwen3, **changes})


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """Weights under Hugging Face names, [out_features, in_features], float32 values that bfloat16 holds exactly."""
    rng = np.random.default_rng(seed)
    random = tiny_qwen3_5.random if _is_qwen3_5(config) else _random
    return {name: _rounded(random(rng, name, shape)) for name, shape in shapes(config).items()}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with this config, under the names that it has in the files."""
    return tiny_qwen3_5.shapes(config) if _is_qwen3_5(config) else _shapes(config)


def _is_qwen3_5(config: Mapping[str, Any]) -> bool:
    return str(config["model_type"]).startswith("qwen3_5")


def write_folder(
    folder: Path, config: Mapping[str, Any], *, seed: int = 0, dtype: str = "BF16", num_shards: int = 1
) -> Path:
    """Write a whole checkpoint as it comes from the hub.

    Args:
        folder: created.
        config: from :func:`qwen2_config`, :func:`qwen3_config` or :mod:`tests.export.tiny_qwen3_5`.
        seed: of the weights.
        dtype: storage type, ``BF16``, ``F16`` or ``F32``.
        num_shards: more than one writes model.safetensors.index.json too.
    """
    folder.mkdir(parents=True)
    tensors = random_tensors(config, seed)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {
            "eos_token_id": [EOS, BOS],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "repetition_penalty": 1.1,
            "bos_token_id": BOS,
            "pad_token_id": BOS,
        },
    )
    write_json(folder / "tokenizer_config.json", {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"})
    (folder / "tokenizer.json").write_bytes(tokenizer_for(config))
    if num_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = names[shard::num_shards]
        write_safetensors(folder / file, {name: tensors[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def write_safetensors(path: Path, tensors: Tensors, dtype: str = "BF16") -> None:
    """Write one safetensors file with the official library."""
    # The library reads from raw pointers: the arrays must live until it has written.
    stored = {name: np.frombuffer(encode(values, dtype), np.uint8) for name, values in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=_DTYPES[dtype], shape=tensors[name].shape, data_ptr=data.ctypes.data, data_len=data.nbytes
        )
        for name, data in stored.items()
    }
    safetensors.serialize_file(specs, path, metadata={"format": "pt"})


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    head_kind: gguf.GGMLQuantizationType | None = None,
    split_max_tensors: int = 0,
) -> Path:
    """Write a GGUF with llama.cpp's names; matrices quantized as ``kind``, a separate head as ``head_kind``.

    A tied config gets an ``output.weight`` of the same table only where ``head_kind`` asks for it.
    ``split_max_tensors`` cuts it into parts of so many, with numbers in their names.
    """
    tensors = random_tensors(config, seed)
    if head_kind is not None and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    architecture = "qwen35" if _is_qwen3_5(config) else config["model_type"]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    _write_metadata(writer, config)
    if architecture == "qwen35":
        _write_linear_metadata(writer, config)
        tensors = tiny_qwen3_5.as_llama_cpp(config, tensors)
    _write_tokenizer(writer, config["vocab_size"], architecture)
    for name, values in tensors.items():
        stored = head_kind if name == "lm_head.weight" and head_kind else kind
        if values.ndim == 1 or "conv1d" in name:
            stored = gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name, architecture), gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str, architecture: str) -> str:
    """llama.cpp's name of a Hugging Face tensor, by the gguf package's own table."""
    if name.startswith("blk."):
        return name
    result: str | None = _name_table(architecture).get_name(name, try_suffixes=(".weight", ".bias"))
    assert result is not None, name
    return result


@cache
def _name_table(architecture: str) -> Any:
    names = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(names[architecture], 64)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def encode(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if config["model_type"] == "qwen2":
            block |= {f"self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
        else:
            block |= {f"self_attn.{x}_norm.weight": (head,) for x in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    values = rng.normal(0.0, 0.12, shape)
    return values + 1.0 if name.endswith("norm.weight") else values


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """As float32 values that bfloat16 holds exactly."""
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def _write_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_name("Tiny Test")
    writer.add_block_count(config["num_hidden_layers"] + config.get("mtp_num_hidden_layers", 0))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_parameters", config)["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _write_linear_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_full_attention_interval(config["full_attention_interval"])
    rope = config["rope_parameters"]
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_nextn_predict_layers(config["mtp_num_hidden_layers"])


def _write_tokenizer(writer: gguf.GGUFWriter, num_rows: int, architecture: str) -> None:
    tokens = [*vocab(), *ADDED]
    kinds = [gguf.TokenType.NORMAL] * len(vocab())
    kinds += [gguf.TokenType.USER_DEFINED if "tool" in text else gguf.TokenType.CONTROL for text in ADDED]
    padding = num_rows - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35" if architecture == "qwen35" else "qwen2")
    writer.add_token_list([*tokens, *(f"[PAD{len(tokens) + i}]" for i in range(padding))])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * padding])
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_eos_token_id(EOS)
    writer.add_bos_token_id(BOS)
    writer.add_pad_token_id(BOS)
    writer.add_chat_template(CHAT_TEMPLATE)
