"""From a checked request to what the service generates: templating, tokenizing, sampling parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge.engine.grammar_source import Grammar
from edge.engine.sampler import SamplingParams
from edge.errors import RequestError
from edge.model import Model
from edge.openai.fill_in import fill_in_ids, fill_in_stops
from edge.openai.grammar import usable_grammar
from edge.openai.prompts import Prompt, prompt_ids
from edge.openai.schemas import SAMPLING_FIELDS, ChatRequest, CompletionRequest
from edge.openai.thinking import requested_thinking, template_thinking
from edge.service import GenerationRequest

TOOL_CALL_TAGS = ("<tool_call>", "</tool_call>")


def prepare(model: Model, request: ChatRequest | CompletionRequest) -> tuple[GenerationRequest, ...]:
    """Turn a request into token ids and parameters, once for each choice: all of the first prompt, then of the next.

    Takes time in proportion to the prompt: call it in a worker thread where an event loop must stay responsive.

    Raises:
        ModelNotFoundError: the request names another model, or an adapter that is not there.
        RequestError: the messages do not suit the template, a parameter is out of range, or the grammar is not usable.
    """
    adapter = model.find_adapter(request.model)
    grammar = usable_grammar(model, request)
    prototype = GenerationRequest(
        prompt_ids=(),
        prepared_for=model,
        sampling=model.sampling(_given_sampling(request)),
        max_tokens=request.token_limit,
        stop=_stops(request, grammar),
        stop_spares=TOOL_CALL_TAGS if isinstance(request, ChatRequest) and request.offered_tools else None,
        ignore_eos=bool(request.ignore_eos),
        num_logprobs=request.num_logprobs,
        score_prompt=request.scores_prompt,
        adapter=adapter,
        grammar=grammar,
    )
    if isinstance(request, ChatRequest):
        prompt_ids = _chat_ids(model, request, grammar)
        thinking = requested_thinking(model, request, grammar, prompt_ids)
        firsts = [replace(prototype, prompt_ids=prompt_ids, thinking=thinking)]
    else:
        firsts = [
            replace(prototype, prompt_ids=_completion_ids(model, prompt, request.suffix)) for prompt in request.prompts
        ]
    return tuple(_nth_choice(first, number) for first in firsts for number in range(request.num_choices))


def _chat_ids(model: Model, request: ChatRequest, grammar: Grammar | None) -> tuple[int, ...]:
    # Templates test whether tools are defined: no tools are None, not an empty list.
    tools = [tool.model_dump(exclude_unset=True) for tool in request.offered_tools] or None
    thinks = template_thinking(request, grammar)
    return model.encode_chat(request.messages, tools=tools, enable_thinking=thinks)


def _completion_ids(model: Model, prompt: Prompt, suffix: str | None) -> tuple[int, ...]:
    if suffix:
        return fill_in_ids(model.tokenizer, prompt_ids(model, prompt, "prompt", special=False), suffix)
    return prompt_ids(model, prompt, "prompt", special=True)


def _stops(request: ChatRequest | CompletionRequest, grammar: Grammar | None) -> tuple[str, ...]:
    given = request.stop or ()
    stops = (given,) if isinstance(given, str) else tuple(given)
    if isinstance(request, CompletionRequest) and request.suffix:
        return (*stops, *fill_in_stops())
    # In a call, a stop string would be a part of the arguments.
    only_calls = grammar is not None and grammar.kind == "tool_calls" and not grammar.leaves_text
    return () if only_calls else stops


def _given_sampling(request: ChatRequest | CompletionRequest) -> dict[str, Any]:
    given = {name: getattr(request, name) for name in SAMPLING_FIELDS}
    if request.logit_bias:
        given["logit_bias"] = _token_biases(request.logit_bias)
    return {name: value for name, value in given.items() if value is not None}


def _nth_choice(first: GenerationRequest, number: int) -> GenerationRequest:
    """A prompt's n-th choice: with a seed of its own, and without the scores that the first one has."""
    if number == 0:
        return first
    return replace(first, sampling=_nth_sampling(first.sampling, number), score_prompt=False)


def _nth_sampling(sampling: SamplingParams, number: int) -> SamplingParams:
    if sampling.seed is None:
        return sampling
    return replace(
        sampling, seed=(sampling.seed + number + 2**63) % 2**64 - 2**63
    )  # the seed after the last is the first


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    """JSON has string keys only: here they become token ids."""
    # More digits than any id has are refused before int() works on them.
    if any(not (key.isascii() and key.isdigit() and len(key) <= 9) for key in biases):
        hint = "use token ids as keys"
        raise RequestError("logit_bias has a key that is no token id", hint=hint, param="logit_bias")
    return {int(key): value for key, value in biases.items()}
