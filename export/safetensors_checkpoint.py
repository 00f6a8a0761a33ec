"""A Hugging Face folder: config.json, safetensors (one file or shards), tokenizer and chat defaults."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edge.bundle import MANIFEST
from edge.errors import CheckpointError
from export.catalog import FAMILY_SAMPLING, catalog, find_by_title
from export.checkpoint import Checkpoint, Origin, StoredTensor, Tensor, Text
from export.files import DAMAGED, read_bytes, read_json, read_text, shown
from export.generation import END_OF_TURN, generation_defaults
from export.prequantized import read_quantized
from export.safetensors_header import FLOATS, open_shard, unsupported
from export.text_part import text_config, text_tensors
from export.tokenizer_json import QWEN2_SPLIT, QWEN3_5_SPLIT, AddedToken, build_tokenizer, inspect_tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_QWEN3_5 = {"qwen3_5", "qwen3_5_text"}
"""Model types of the family that is published without a generation_config.json, and cuts text in a way of its own."""
_OTHER_SPLIT = (
    f"{TOKENIZER} cuts Hindi, Thai, Arabic and others in another way than Qwen3.5: some tools save it so; "
    "take the original file if these matter"
)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_folder(folder: Path, origin: Origin) -> Checkpoint:
    """Open a folder as it comes from the hub.

    Raises:
        CheckpointError: a file is missing, damaged, or of a kind that is not supported.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}", hint=_folder_hint(folder))
    config = read_json(folder / CONFIG)
    config = text_config(config, keep="quantization_config")
    quantization = config.pop("quantization_config", None)
    tokenizer_config = _optional_json(folder / TOKENIZER_CONFIG)
    split = QWEN3_5_SPLIT if config.get("model_type") in _QWEN3_5 else QWEN2_SPLIT
    tokenizer = _tokenizer(folder, tokenizer_config, split)
    facts = inspect_tokenizer(tokenizer, str(folder / TOKENIZER))
    template = _chat_template(folder, tokenizer_config)
    also_stop = [facts.added[END_OF_TURN]] if template is not None and END_OF_TURN in facts.added else []
    generation = generation_defaults(_generation_config(folder, config, origin), config, also_stop=also_stop)
    with ExitStack() as stack:
        everything, shards = _weights(folder, stack)
        original = read_quantized(quantization, everything) if quantization else everything
        stored, notes = text_tensors(config, original)
        _refuse_other_types(stored)
        notes += _drop_tied_head(config, stored)
        if split == QWEN3_5_SPLIT and split not in facts.splits:
            notes.append(_OTHER_SPLIT)
        checkpoint = Checkpoint(
            config=config,
            generation=generation,
            stored=stored,
            # Those too of which nothing is read: a shard may hold nothing but vision.
            opened=list({tensor.file.path: tensor.file for tensor in everything.values()}.values()),
            text=Text(tokenizer, facts.num_ids, template),
            origin=origin,
            files={path.name: path for path in [*shards, *_read_besides(folder)]},
            notes=notes,
            quantized=quantization["quant_method"] if quantization else None,
        )
        stack.pop_all()
    return checkpoint


def _weights(folder: Path, stack: ExitStack) -> tuple[dict[str, StoredTensor], list[Path]]:
    """Every tensor of the folder, and the files they lie in; ``stack`` closes these."""
    if (folder / WEIGHTS).exists():
        index = None
        shards = [folder / WEIGHTS]
    elif (folder / INDEX).exists():
        index = _index(folder / INDEX)
        shards = [folder / name for name in sorted(set(index.values()))]
    else:
        raise CheckpointError(f"{folder} has no {WEIGHTS}", hint=_folder_hint(folder))
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        file, tensors = open_shard(shard)
        stack.callback(file.close)
        if twice := stored.keys() & tensors.keys():
            raise CheckpointError(f"{shard.name}: tensor {shown(min(twice))} stands in another shard too", hint=DAMAGED)
        stored |= tensors
    if index is not None:
        _check_index(index, stored)
    return stored, shards


def _index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name} has no weight_map", hint=DAMAGED)
    for tensor, shard in weight_map.items():
        # A plain name: an index must not reach outside its folder.
        if not isinstance(shard, str) or "/" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path.name} puts tensor {shown(tensor)} into {shown(shard)}", hint=DAMAGED)
    return weight_map


def _check_index(index: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> None:
    for name, shard in index.items():
        if name not in stored or stored[name].file.path.name != shard:
            raise CheckpointError(f"{shard} lacks tensor {shown(name)}, which {INDEX} puts there", hint=DAMAGED)
    if extra := stored.keys() - index.keys():
        name = min(extra)
        raise CheckpointError(f"{stored[name].file.path.name}: tensor {shown(name)} is not in {INDEX}", hint=DAMAGED)


def _refuse_other_types(stored: Mapping[str, Tensor]) -> None:
    for name, tensor in stored.items():
        if isinstance(tensor, StoredTensor) and tensor.info.dtype not in FLOATS:
            raise unsupported(f"{tensor.file.path.name}: tensor {shown(name)}", tensor.info.dtype)


def _drop_tied_head(config: Mapping[str, Any], stored: dict[str, Tensor]) -> list[str]:
    """Qwen3-0.6B and 1.7B store their tied table twice; transformers reads the embedding and so does the exporter."""
    if config.get("tie_word_embeddings") is not True or not {_EMBEDDING, _HEAD} <= stored.keys():
        return []
    del stored[_HEAD]
    return [f"{_HEAD} is not read: the config ties it to {_EMBEDDING}"]


def _tokenizer(folder: Path, tokenizer_config: Mapping[str, Any], split: str) -> bytes:
    if (folder / TOKENIZER).is_file():
        return read_bytes(folder / TOKENIZER)
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        hint = "add tokenizer.json, or vocab.json with merges.txt, from the same model"
        raise CheckpointError(f"{folder} has no {TOKENIZER}", hint=hint)
    lines = read_text(folder / "merges.txt").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if bad := next((pair for pair in merges if len(pair) != 2), None):
        raise CheckpointError(f"{folder / 'merges.txt'} holds {shown(' '.join(bad))}, not a pair", hint=DAMAGED)
    pairs = [(pair[0], pair[1]) for pair in merges]
    return build_tokenizer(read_json(folder / "vocab.json"), pairs, _added_tokens(tokenizer_config), split)


def _added_tokens(tokenizer_config: Mapping[str, Any]) -> list[AddedToken]:
    """``added_tokens_decoder`` of tokenizer_config.json."""
    entries = tokenizer_config.get("added_tokens_decoder", {})
    try:
        tokens = [AddedToken(int(key), str(each["content"]), each["special"] is True) for key, each in entries.items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"added_tokens_decoder of {TOKENIZER_CONFIG} is malformed", hint=DAMAGED) from None
    return sorted(tokens, key=lambda token: token.id)


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    if (folder / CHAT_TEMPLATE).is_file():
        return read_text(folder / CHAT_TEMPLATE)
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if template is None or isinstance(template, str):
        return template
    raise CheckpointError(f"chat_template of {TOKENIZER_CONFIG} is no text", hint=DAMAGED)


def _generation_config(folder: Path, config: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
    if (folder / GENERATION_CONFIG).is_file() or config.get("model_type") not in _QWEN3_5:
        return _optional_json(folder / GENERATION_CONFIG)
    entry = catalog().get(origin.location) or find_by_title(origin.location.rpartition("/")[2])
    sampling = entry.generation if entry else FAMILY_SAMPLING[config["model_type"]]
    return {**sampling.model_dump(), "do_sample": True}


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_besides(folder: Path) -> list[Path]:
    """The files beside the weights that decided what this checkpoint is."""
    names = [CONFIG, INDEX, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE, "vocab.json", "merges.txt"]
    return [folder / name for name in names if (folder / name).is_file()]


def _folder_hint(folder: Path) -> str:
    if (folder / MANIFEST).is_file():
        return f"it is a bundle already: qwedge serve --bundle {folder}"
    if found := next(folder.glob("*.gguf"), None):
        return f"give the GGUF file itself: {found}"
    if next(folder.glob("*.bin"), None) or next(folder.glob("*.pth"), None):
        return "PyTorch pickles can run code and are not read: get the model in safetensors format"
    return "give a folder with config.json, model.safetensors and tokenizer.json"
