"""Whether and how long an answer thinks first."""

from __future__ import annotations

from edge.engine.grammar_source import Grammar
from edge.engine.thinking import OPENING, Thinking
from edge.model import Model
from edge.openai.schemas import ChatRequest

_TAIL_TOKENS = 8
"""Tokens at a prompt's end that are enough to see whether the template opened a ``<think>`` block."""


def template_thinking(request: ChatRequest, grammar: Grammar | None) -> bool | None:
    """What the template is told: a form that the answer must have is thought about only where that is asked for."""
    is_form = grammar is not None and not grammar.leaves_text
    return False if request.thinking is None and is_form else request.thinking


def opens_thinking(model: Model, prompt_ids: tuple[int, ...]) -> bool:
    """Whether a prompt ends inside of the ``<think>`` block."""
    return model.tokenizer.decode(prompt_ids[-_TAIL_TOKENS:]).endswith(OPENING)


def requested_thinking(
    model: Model, request: ChatRequest, grammar: Grammar | None, prompt_ids: tuple[int, ...]
) -> Thinking | None:
    """How an answer's thoughts are held to a budget, or kept apart from its form; None where nothing is to be done."""
    nature = "never" if model.template is None else model.template.thinks
    if nature == "never":
        return None
    if opens_thinking(model, prompt_ids):
        return _of_opened(request, grammar)
    continues = request.messages[-1].get("role") == "assistant"
    if continues or template_thinking(request, grammar) is False:
        return None
    limit = request.thinking_limit
    if request.thinking:
        # Where a form or the end of the budget is waited for, the block must be there.
        return None if grammar is None and limit is None else Thinking("forced", limit)
    return None if grammar is None else Thinking("free")


def _of_opened(request: ChatRequest, grammar: Grammar | None) -> Thinking | None:
    """A template may think whatever it is told: the block is closed at once then."""
    limit = 0 if request.thinking is False else request.thinking_limit
    return None if grammar is None and limit is None else Thinking("given", limit)
