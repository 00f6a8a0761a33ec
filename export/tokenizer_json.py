"""The tokenizer file: check one, or rebuild one from a vocabulary and merges.

The rebuilt file is the byte-level BPE of the Qwen families: NFC, the family's splitting expression, byte level.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from edge.errors import CheckpointError
from export.files import DAMAGED, parse_object, shown

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2, Qwen2.5 and Qwen3 cut text before merging."""
QWEN3_5_SPLIT = QWEN2_SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
"""How Qwen3.5 does: marks belong to words, so Hindi, Thai and Arabic are cut elsewhere."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole before anything is split."""

    id: int
    content: str
    special: bool
    """Whether decoding leaves it out of the text."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What the exporter needs to know about a tokenizer."""

    num_ids: int
    """Highest id + 1."""
    added: Mapping[str, int]
    """Ids of the added tokens."""
    splits: frozenset[str]
    """Expressions that cut the text before merging."""


def build_tokenizer(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Sequence[AddedToken], split: str = QWEN2_SPLIT
) -> bytes:
    """Write tokenizer.json for a byte-level BPE.

    Args:
        vocab: ids of the ordinary tokens, spelled in the byte-level alphabet.
        merges: pairs in order of their rank.
        added: tokens beside the vocabulary, by id.
        split: expression that cuts the text into words.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token) for token in added],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": _bpe(vocab, merges),
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def inspect_tokenizer(content: bytes, name: str) -> TokenizerFacts:
    """Load a tokenizer.json to see that it works, and list its ids.

    Args:
        content: the file's bytes.
        name: what to call it in a message.

    Raises:
        CheckpointError: the ``tokenizers`` library refuses it, or it has no vocabulary.
    """
    document = parse_object(content, name)
    try:
        Tokenizer.from_buffer(content)
    except BaseException as error:  # the library raises bare Exception, and a panic in its Rust is not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{name} is no usable tokenizer: {shown(str(error))}", hint=DAMAGED) from None
    vocab = document["model"].get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{name} has no vocabulary of ids", hint="only BPE tokenizers (Qwen) are supported")
    added = {token["content"]: token["id"] for token in document.get("added_tokens", [])}
    return TokenizerFacts(max(*vocab.values(), *added.values(), 0) + 1, added, _splits(document))


def _splits(document: Mapping[str, Any]) -> frozenset[str]:
    outer = document.get("pre_tokenizer") or {}
    parts = outer.get("pretokenizers", [outer])
    return frozenset(part["pattern"]["Regex"] for part in parts if "Regex" in part.get("pattern", {}))


def _added_token(token: AddedToken) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token.id, "content": token.content, **flags, "special": token.special}


def _bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocab),
        "merges": merges,
    }
