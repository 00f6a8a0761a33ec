"""What is served: the text side of a bundle, from words to token ids and parameters."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge.adapters import Adapters
from edge.bundle import Manifest
from edge.chat import ChatTemplate
from edge.engine.grammar import Grammars
from edge.engine.grammar_source import Grammar
from edge.engine.lora import Adapter
from edge.engine.sampler import SamplingParams
from edge.errors import ModelNotFoundError, RequestError
from edge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    """What the service serves: the manifest and the text side of a bundle."""

    manifest: Manifest
    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: frozenset[int]
    sampling_defaults: Mapping[str, float | int] = field(default_factory=dict)
    """Fields of :class:`SamplingParams` as the model's makers recommend them."""
    context_length: int = 0
    """Tokens per sequence as served: at most the manifest's."""
    loaded_at: float = field(default_factory=time.time)
    """Unix time, for OpenAI's ``created``."""
    adapters: Adapters | None = None
    """LoRA adapters, where the graph has places for them."""
    grammars: Grammars = field(init=False, repr=False, compare=False)
    """Compiled for this vocabulary."""

    def __post_init__(self) -> None:
        grammars = Grammars(self.tokenizer, self.manifest.vocab_size, self.eos_ids)
        object.__setattr__(self, "grammars", grammars)

    def names(self) -> list[str]:
        """What requests can ask for: the model by itself, and with each adapter as ``NAME:ADAPTER``."""
        name = self.manifest.name
        return [name, *(f"{name}:{adapter}" for adapter in (self.adapters.names() if self.adapters else ()))]

    def find_adapter(self, name: str | None) -> Adapter | None:
        """The adapter that a request's model name asks for: None for the served model's own name, and for no name.

        An adapter that is not in memory is read from disk, which takes tens of milliseconds.

        Raises:
            ModelNotFoundError: neither model nor adapter of that name is there.
        """
        model, colon, adapter = (name or self.manifest.name).partition(":")
        if model == self.manifest.name:
            if not colon:
                return None
            if self.adapters and (found := self.adapters.find(adapter)):
                return found
        hint = f"this device serves {_some(self.names())}; see GET /v1/models"
        raise ModelNotFoundError(f"the model {name!r} is not served here", hint=hint, param="model")

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar, so that its use later is quick; the first one takes about half a second.

        Raises:
            RequestError: the grammar is malformed or too large.
        """
        self.grammars.constraint(grammar)

    def sampling(self, given: Mapping[str, Any]) -> SamplingParams:
        """Sampling parameters of a request: what it gives over the model's defaults.

        Raises:
            RequestError: a value is out of range.
        """
        return SamplingParams(**{**self.sampling_defaults, **given})

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> tuple[int, ...]:
        """Prompt ids of a conversation; ``options`` are those of :meth:`edge.chat.ChatTemplate.encode`.

        Raises:
            RequestError: the messages are malformed, or the model has no chat template.
        """
        if self.template is None:
            hint = "use /v1/completions with this model"
            raise RequestError("this model has no chat template", hint=hint, param="messages")
        return tuple(self.template.encode(self.tokenizer, messages, **options))


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
