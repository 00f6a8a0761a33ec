"""The tokenizer and chat template inside a GGUF, rebuilt as the files a Hugging Face folder has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from edge.errors import CheckpointError
from export.files import DAMAGED, shown
from export.tokenizer_json import QWEN2_SPLIT, QWEN3_5_SPLIT, AddedToken, build_tokenizer

SPLITS: Mapping[str, str] = {"qwen2": QWEN2_SPLIT, "qwen35": QWEN3_5_SPLIT}
"""``tokenizer.ggml.pre`` → the expression that cuts text into words."""
_ORDINARY_ADDED = frozenset(
    {
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
        "<think>",
        "</think>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
    }
)
"""Added tokens that Qwen's own tokenizer keeps in decoded text; llama.cpp marks some of them as control tokens."""
_BROKEN_BRACES = '{{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}}'


class _TokenType(IntEnum):
    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class GGUFTokenizer:
    """A rebuilt tokenizer."""

    json: bytes
    num_ids: int
    """Ids before the padding of the embedding table."""
    added: Mapping[str, int]


def rebuild_tokenizer(metadata: Mapping[str, Any], name: str) -> GGUFTokenizer:
    """Rebuild tokenizer.json from tokens, types and merges.

    Args:
        metadata: the GGUF's metadata.
        name: the file's name, for messages.

    Raises:
        CheckpointError: the tokenizer is of another kind, or its arrays do not fit together.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or not isinstance(pre, str) or pre not in SPLITS:
        hint = f"supported: gpt2 with {', '.join(SPLITS)}; export from the Hugging Face folder instead"
        raise CheckpointError(f"{name} has a tokenizer of kind {shown(model)}, {shown(pre)}", hint=hint)
    tokens, types = _strings(metadata, "tokenizer.ggml.tokens", name), metadata.get("tokenizer.ggml.token_type")
    kinds = types.tolist() if isinstance(types, np.ndarray) else []
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{name} has {len(tokens)} tokens but {len(kinds)} token types", hint=DAMAGED)
    vocab, added = {}, {}
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in (_TokenType.CONTROL, _TokenType.USER_DEFINED):
            added[token] = index
        elif kind == _TokenType.NORMAL:
            vocab[token] = index
        elif kind != _TokenType.UNUSED:
            raise CheckpointError(f"{name} gives token {index} the unsupported type {kind}", hint=DAMAGED)
    if len(vocab) + len(added) + kinds.count(_TokenType.UNUSED) != len(tokens) or not vocab:
        raise CheckpointError(f"{name} has no tokens, or one of them twice", hint=DAMAGED)
    listed = [AddedToken(index, token, token not in _ORDINARY_ADDED) for token, index in added.items()]
    content = build_tokenizer(vocab, _merges(metadata, name), listed, SPLITS[pre])
    return GGUFTokenizer(content, max([*vocab.values(), *added.values()]) + 1, added)


def repair_template(template: str) -> tuple[str, list[str]]:
    """Undo the one known defect of a published template: doubled braces in Qwen2.5-Coder-1.5B's tool prompt.

    Returns:
        The template, and a note for the user when something was changed.
    """
    if _BROKEN_BRACES not in template:
        return template, []
    note = 'the chat template\'s tool prompt had doubled braces around {"name": ...}: repaired'
    return template.replace(_BROKEN_BRACES, _BROKEN_BRACES[1:-1]), [note]


def _strings(metadata: Mapping[str, Any], key: str, name: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise CheckpointError(f"{name} lacks {key}", hint="use a GGUF made by a current llama.cpp")
    return value


def _merges(metadata: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    pairs = []
    for merge in _strings(metadata, "tokenizer.ggml.merges", name):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise CheckpointError(f"{name} holds the merge {shown(merge)}, which is no pair", hint=DAMAGED)
        pairs.append((left, right))
    return pairs
