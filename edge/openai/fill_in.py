"""Fill-in-the-middle: code before a gap and behind it, by the tokens that Qwen's Coder models know for it [1].

[1] https://github.com/QwenLM/Qwen2.5-Coder#3-file-level-code-completion-fill-in-the-middle
"""

from __future__ import annotations

from edge.errors import RequestError
from edge.tokenizer import Tokenizer

_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_ENDS = (*_TOKENS, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


def fill_in_ids(tokenizer: Tokenizer, prompt_ids: tuple[int, ...], suffix: str) -> tuple[int, ...]:
    """The prompt ids for a gap between a prompt and a suffix; special tokens in the suffix are ordinary characters.

    Raises:
        RequestError: the model has no tokens for this.
    """
    prefix_id, suffix_id, middle_id = map(tokenizer.id_of, _TOKENS)
    if prefix_id is None or suffix_id is None or middle_id is None:
        hint = "serve a Coder model, or leave suffix out"
        raise RequestError("this model cannot fill in a gap", hint=hint, param="suffix")
    return (prefix_id, *prompt_ids, suffix_id, *tokenizer.encode(suffix, special=False), middle_id)


def fill_in_stops() -> tuple[str, ...]:
    """Tokens with which a model shows that the gap is filled; they have a text."""
    return _ENDS
