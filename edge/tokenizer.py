"""Text to token ids and back, for byte-level BPE vocabularies (``tokenizer.json``).

Special tokens (``<|im_start|>``, ``<|im_end|>``) steer the model, so the library below never finds them in a text: it
is told to read them as ordinary characters, and :meth:`Tokenizer.encode` splits at them only where the caller says
that the text may contain them. Added tokens that are not special (``<think>``, ``<tool_call>``, ``<|fim_prefix|>``)
are found everywhere, as in every other runtime.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders

from edge.errors import BundleError, RequestError


class Tokenizer:
    """The vocabulary of one model. Thread-safe.

    Attributes:
        vocab_size: number of real token ids; the logits may be wider.
        special_ids: ids of the special tokens.

    Args:
        backend: a byte-level tokenizer; it is reconfigured and belongs to this object from then on.

    Raises:
        BundleError: the tokenizer is not byte-level.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            hint = "Qwen's tokenizers are byte-level; export the bundle again"
            raise BundleError("the tokenizer is not a byte-level one", hint=hint)
        backend.encode_special_tokens = True
        # A tokenizer.json may carry both, and would then cut or pad every prompt.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(special.values())
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=False) - 1, *added]) + 1
        self._special = special
        self._find_special = _any_of(special)
        self._shield_at = re.compile(f"(?={self._find_special.pattern})(.)", re.DOTALL)
        self._beginnings = tuple({token[:end] for token in special for end in range(1, len(token))})
        self._endings = tuple({token[start:] for token in special for start in range(1, len(token))})

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            BundleError: the file is missing, malformed, or not a byte-level tokenizer.
        """
        hint = "export or copy the bundle again"
        try:
            return cls(tokenizers.Tokenizer.from_buffer(path.read_bytes()))
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
        except ValueError as error:
            raise BundleError(f"{path} is not a tokenizer: {error}", hint=hint) from None

    def encode(self, text: str, *, special: bool, mark: str = "") -> list[int]:
        """Token ids of a text; nothing is put before or behind them.

        Args:
            text: any valid Unicode.
            special: whether ``<|im_start|>`` and the like mean the special token: True for rendered templates and for
                raw completion prompts, whose author writes the whole prompt anyway; False for text from elsewhere.
            mark: deleted after the special tokens were found; see :meth:`shield`.

        Raises:
            RequestError: the text has a lone surrogate.
        """
        if not special:
            return self._encode_ordinary(text)
        ids: list[int] = []
        # The pattern is one group, so the texts between special tokens alternate with the tokens.
        for index, piece in enumerate(self._find_special.split(text)):
            if index % 2:
                ids.append(self._special[piece])
            else:
                ids += self._encode_ordinary(piece.replace(mark, "") if mark else piece)
        return ids

    def shield(self, text: str, mark: str) -> str:
        """Break every special token in a text apart, so that ``encode(..., special=True, mark=mark)`` finds none.

        A beginning of a special token at the end of the text, or an ending at its start, is fenced off as well, so that
        what a template puts next to it does not complete it. A role between ``<|`` and ``|>`` stays usable.

        Args:
            text: text of unknown origin, to be put into a template.
            mark: a string that occurs in no such text and that templates leave alone.
        """
        if text.lstrip().startswith(self._endings):
            start = len(text) - len(text.lstrip())
            text = text[:start] + mark + text[start:]
        if text.rstrip().endswith(self._beginnings):
            end = len(text.rstrip())
            text = text[:end] + mark + text[end:]
        return self._shield_at.sub(lambda match: match[0] + mark, text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        kept = (i for i in ids if not (skip_special and i in self.special_ids))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token, which may be a part of a character; none for an id without a token."""
        if (literal := self._added.get(token_id)) is not None:
            return literal
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:
            return token.encode()

    def id_of(self, token: str) -> int | None:
        """Id of a token as it stands in the vocabulary, or None."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def _encode_ordinary(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            # The library takes any str but those that have no UTF-8 form.
            raise RequestError(
                "the text is not valid Unicode", hint="remove lone surrogates (\\ud800-\\udfff)"
            ) from None
        return ids


def _any_of(literals: Iterable[str]) -> re.Pattern[str]:
    """A pattern of one group that finds the longest of several literals; with none, one that never matches."""
    ordered = sorted(literals, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, ordered))})" if ordered else r"((?!))")


def _byte_alphabet() -> dict[str, int]:
    """Character to byte of byte-level BPE: printable Latin-1 stands for itself, the rest from U+0100 upwards.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
