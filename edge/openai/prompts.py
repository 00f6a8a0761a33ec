"""Prompts as text or token ids, one or a batch of them: what several kinds of request take."""

from __future__ import annotations

from typing import Any

from edge.errors import RequestError
from edge.model import Model

Prompt = str | tuple[int, ...]
"""Text, or token ids."""


def read_prompts(value: str | list[Any], param: str, most: int) -> list[Prompt]:
    """The prompts in a field: a text, token ids, or a list of such prompts.

    Args:
        value: of the field.
        param: the field's name, for errors.
        most: prompts at once.

    Raises:
        RequestError: one is empty, or neither text nor integers; or there are too many.
    """
    batch = [value] if isinstance(value, str) or not any(isinstance(item, str | list) for item in value) else value
    if len(batch) > most:
        raise RequestError(f"{param} has too many entries", hint=f"send {most} at most", param=param)
    return [_read(item, param) for item in batch]


def prompt_ids(model: Model, prompt: Prompt, param: str, *, special: bool) -> tuple[int, ...]:
    """The token ids of a prompt.

    Args:
        model: whose tokens they are.
        prompt: text or ids.
        param: the field it came from, for errors.
        special: whether special tokens in a text mean themselves; see :meth:`edge.tokenizer.Tokenizer.encode`.

    Raises:
        RequestError: an id is outside the vocabulary.
    """
    if isinstance(prompt, str):
        return tuple(model.tokenizer.encode(prompt, special=special))
    most = model.manifest.padded_vocab_size - 1
    if not all(0 <= token_id <= most for token_id in prompt):
        hint = f"use ids from 0 to {most}"
        raise RequestError(f"{param} holds a token id outside the vocabulary", hint=hint, param=param)
    return prompt


def _read(prompt: Any, param: str) -> Prompt:
    if prompt in ("", []):
        raise RequestError(f"the {param} is empty", hint="send text or token ids", param=param)
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in prompt):
        hint = "send one of them"
        raise RequestError(f"an entry of {param} is neither text nor token ids", hint=hint, param=param)
    return tuple(prompt)
