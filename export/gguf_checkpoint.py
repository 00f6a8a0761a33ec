"""A GGUF file read as if it were a Hugging Face folder: its names, keys and tokenizer are translated.

A further architecture is one more row of :data:`ARCHITECTURES`. Bytes are read by offset and dequantized chunk by chunk
with the ``gguf`` package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray

from edge.errors import CheckpointError
from export.catalog import FAMILY_SAMPLING, catalog, find_by_title
from export.checkpoint import Checkpoint, GenerationDefaults, Origin, StoredTensor, TensorInfo, Text
from export.files import DAMAGED, WeightFile, shown
from export.generation import END_OF_TURN, generation_defaults
from export.gguf_header import GGUFTensor
from export.gguf_parts import GGUFParts, read_parts
from export.gguf_qwen3_5 import name_prediction, restore
from export.gguf_tokenizer import GGUFTokenizer, rebuild_tokenizer, repair_template
from export.text_part import text_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_END_OF_TEXT = "<|endoftext|>"
_SAME_TABLE = 0.15
"""Two quantizations of one table differ by less than this, relative to its RMS; two tables by about 1.4."""
_SAMPLED_ROWS = 64
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class GGUFArchitecture:
    """How one ``general.architecture`` maps onto a Hugging Face ``model_type``."""

    model_type: str
    blocks: Mapping[str, str]
    """Name behind ``blk.{i}.`` → name behind ``model.layers.{i}.``."""
    config: Mapping[str, Any]
    """Keys of config.json that a GGUF implies but does not store."""
    has_linear_attention: bool = False


_TABLES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_DENSE_BLOCKS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    "qwen2": GGUFArchitecture(
        model_type="qwen2",
        blocks={**_DENSE_BLOCKS, **{f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}},
        config={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "qwen3": GGUFArchitecture(
        model_type="qwen3",
        blocks={**_DENSE_BLOCKS, **{f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}},
        config={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    ),
    "qwen35": GGUFArchitecture(
        model_type="qwen3_5_text",
        blocks={
            **_DENSE_BLOCKS,
            **{f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"},
            "post_attention_norm.weight": "post_attention_layernorm.weight",
            "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
            "attn_gate.weight": "linear_attn.in_proj_z.weight",
            "ssm_beta.weight": "linear_attn.in_proj_b.weight",
            "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
            "ssm_conv1d.weight": "linear_attn.conv1d.weight",
            "ssm_a": "linear_attn.A_log",
            "ssm_dt.bias": "linear_attn.dt_bias",
            "ssm_norm.weight": "linear_attn.norm.weight",
            "ssm_out.weight": "linear_attn.out_proj.weight",
        },
        config={"hidden_act": "silu", "attention_bias": False, "attn_output_gate": True},
        has_linear_attention=True,
    ),
}
_REQUIRED_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}
_LINEAR_KEYS = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "full_attention_interval": "full_attention_interval",
}
_MTP_LAYERS = "nextn_predict_layers"


def open_gguf(path: Path, origin: Origin) -> Checkpoint:
    """Open a GGUF file; of one that is split, any part.

    Raises:
        CheckpointError: it is damaged, incomplete, of an unsupported architecture or quantization.
    """
    parts = read_parts(path)
    metadata = parts.metadata
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = f"supported architectures: {', '.join(ARCHITECTURES)}"
        raise CheckpointError(f"{parts.name} has the architecture {shown(name)}, which is not supported", hint=hint)
    tokenizer = rebuild_tokenizer(metadata, parts.name)
    template, notes = _template(metadata, parts.name)
    with ExitStack() as stack:
        files = {part: WeightFile.open(part) for part in parts.headers}
        for file in files.values():
            stack.callback(file.close)
        architecture = ARCHITECTURES[name]
        stored, table_notes = _tensors(parts, architecture, files, tokenizer.num_ids)
        config = _config(metadata, name, stored, parts.name)
        if architecture.has_linear_attention:
            stored, skipped = text_tensors(config, name_prediction(config["num_hidden_layers"], stored))
            stored = restore(config, stored)
            notes += skipped
        checkpoint = Checkpoint(
            config=config,
            generation=_generation(metadata, config, tokenizer, origin),
            stored=stored,
            opened=list(files.values()),
            text=Text(tokenizer.json, tokenizer.num_ids, template),
            origin=replace(origin, location=parts.name) if len(files) > 1 else origin,
            files={part.name: part for part in files},
            notes=[*table_notes, *notes],
        )
        stack.pop_all()
    return checkpoint


def _tensors(
    parts: GGUFParts, architecture: GGUFArchitecture, files: Mapping[Path, WeightFile], num_ids: int
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Every tensor under its Hugging Face name; one that has none keeps its own, and the architecture reports it."""
    stored: dict[str, StoredTensor] = {}
    for path, tensor in parts.tensors():
        name = _hf_name(tensor.name, architecture)
        if name in stored:
            raise CheckpointError(f"{path.name} has tensor {shown(name)} twice", hint=DAMAGED)
        stored[name] = _stored(tensor, files[path])
    if EMBEDDING not in stored:
        raise CheckpointError(f"{parts.name} has no token_embd.weight", hint="this is no complete language model")
    if HEAD not in stored or not _is_same_table(stored[EMBEDDING], stored[HEAD], num_ids):
        return stored, []
    head = stored.pop(HEAD)
    kept, dropped = stored[EMBEDDING], head
    if head.row_bytes > kept.row_bytes:
        kept, dropped = head, kept
        stored[EMBEDDING] = head
    what = f"kept the finer one ({kept.info.dtype}, not {dropped.info.dtype})"
    return stored, [f"token_embd.weight and output.weight are one tied table quantized twice: {what}"]


def _hf_name(name: str, architecture: GGUFArchitecture) -> str:
    if name in _TABLES:
        return _TABLES[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in architecture.blocks:
        return name
    return f"model.layers.{match[1]}.{architecture.blocks[match[2]]}"


def _stored(tensor: GGUFTensor, file: WeightFile) -> StoredTensor:
    kind, shape, row_bytes = tensor.type, tensor.shape, tensor.row_bytes
    if len(shape) == 1:
        # A vector is read by element where its type has no blocks, so that its rows are its elements as elsewhere.
        block_size, row_bytes = GGML_QUANT_SIZES[kind]
        if block_size != 1:
            hint = "llama.cpp stores vectors as F32 or F16"
            raise CheckpointError(f"{file.path.name}: vector {shown(tensor.name)} has type {kind.name}", hint=hint)
    return StoredTensor(TensorInfo(shape, kind.name), file, tensor.offset, row_bytes, _decoder(tensor, file.path))


def _decoder(tensor: GGUFTensor, path: Path) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    kind = tensor.type

    def decode(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
        # A damaged scale may be infinite; the export's own checks see what comes of it.
        with np.errstate(all="ignore"):
            values: NDArray[np.float32] = dequantize(raw, kind)
        return values

    try:
        decode(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8))
    except NotImplementedError:
        hint = "use a quantization such as Q4_K_M or Q8_0, or the Hugging Face folder"
        raise CheckpointError(f"{path.name}: no reader for {kind.name} ({shown(tensor.name)})", hint=hint) from None
    return decode


def _is_same_table(first: StoredTensor, second: StoredTensor, num_ids: int) -> bool:
    """Compare rows spread over the real ids; padding rows may be anything."""
    if first.info.shape != second.info.shape:
        return False
    step = max(1, min(num_ids, first.info.shape[0]) // _SAMPLED_ROWS)
    sampled = range(0, step * _SAMPLED_ROWS, step)
    rows = [row for row in sampled if row < first.info.shape[0]]
    ours = np.concatenate([first.rows(row, row + 1) for row in rows], dtype=np.float64)
    theirs = np.concatenate([second.rows(row, row + 1) for row in rows], dtype=np.float64)
    # A NaN in damaged rows compares false: two tables.
    with np.errstate(invalid="ignore"):
        return bool(np.linalg.norm(ours - theirs) < _SAME_TABLE * np.linalg.norm(theirs))


def _config(metadata: Mapping[str, Any], name: str, stored: Mapping[str, StoredTensor], file: str) -> dict[str, Any]:
    architecture = ARCHITECTURES[name]
    config: dict[str, Any] = {"model_type": architecture.model_type, **architecture.config}
    for key, gguf_key in _REQUIRED_KEYS.items():
        config[key] = _number(metadata, f"{name}.{gguf_key}", int, file)
    heads = max(1, config["num_attention_heads"])
    key_length = f"{name}.attention.key_length"
    config["head_dim"] = (
        _number(metadata, key_length, int, file) if key_length in metadata else config["hidden_size"] // heads
    )
    config["rms_norm_eps"] = _number(metadata, f"{name}.attention.layer_norm_rms_epsilon", float, file)
    config["rope_theta"] = _number(metadata, f"{name}.rope.freq_base", float, file)
    config["rope_scaling"] = _rope_scaling(metadata, name, file)
    config["vocab_size"] = stored[EMBEDDING].info.shape[0]
    config["tie_word_embeddings"] = HEAD not in stored
    return config | _linear_config(metadata, name, config, file) if architecture.has_linear_attention else config


def _linear_config(metadata: Mapping[str, Any], name: str, config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What only a model with linear attention has, and its number of layers without those beyond the text."""
    linear: dict[str, Any] = {key: _number(metadata, f"{name}.{end}", int, file) for key, end in _LINEAR_KEYS.items()}
    values_size = _number(metadata, f"{name}.ssm.inner_size", int, file)
    linear["linear_value_head_dim"] = max(1, values_size // linear["linear_num_value_heads"])
    rotated = _number(metadata, f"{name}.rope.dimension_count", int, file)
    linear["partial_rotary_factor"] = rotated / config["head_dim"]
    beyond = metadata.get(f"{name}.{_MTP_LAYERS}")
    if type(beyond) is int and beyond > 0:
        linear["num_hidden_layers"] = max(1, config["num_hidden_layers"] - beyond)
        linear["mtp_num_hidden_layers"] = beyond
    return linear


def _rope_scaling(metadata: Mapping[str, Any], name: str, file: str) -> dict[str, Any] | None:
    """``rope_scaling`` as transformers spells it."""
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind}
    scaling["factor"] = _number(metadata, f"{name}.rope.scaling.factor", float, file)
    original = f"{name}.rope.scaling.original_context_length"
    if original in metadata:
        scaling["original_max_position_embeddings"] = _number(metadata, original, int, file)
    return scaling


def _number(metadata: Mapping[str, Any], key: str, kind: type[int | float], file: str) -> Any:
    value = metadata.get(key)
    if type(value) is not kind or not 0 < value < 1 << 48:
        raise CheckpointError(f"{file} has {key} = {shown(value)}", hint="use a GGUF made by a current llama.cpp")
    # Metadata is float32: its shortest spelling is what the config said (1e-06, not 9.99999997e-07).
    return value if kind is int else float(str(np.float32(value)))


def _template(metadata: Mapping[str, Any], file: str) -> tuple[str | None, list[str]]:
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        return None, []
    if not isinstance(template, str):
        raise CheckpointError(f"{file} has a chat template that is no text", hint=DAMAGED)
    return repair_template(template)


def _generation(
    metadata: Mapping[str, Any], config: Mapping[str, Any], tokenizer: GGUFTokenizer, origin: Origin
) -> GenerationDefaults:
    """Stop ids from the file, sampling from the catalog: a GGUF carries none."""
    entry = catalog().get(origin.location) or find_by_title(str(metadata.get("general.name", "")))
    sampling = entry.generation if entry else FAMILY_SAMPLING[config["model_type"]]
    ids = {
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    stops = [tokenizer.added[token] for token in (END_OF_TURN, _END_OF_TEXT) if token in tokenizer.added]
    settings = {**sampling.model_dump(), **ids, "do_sample": True}
    return generation_defaults(settings, {}, also_stop=stops)
