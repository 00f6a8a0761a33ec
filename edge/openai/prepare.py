"""From a checked request to what the service generates: templating, tokenizing, sampling parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge.engine.sampler import SamplingParams
from edge.errors import RequestError
from edge.model import Model
from edge.openai.grammar import requested_grammar
from edge.openai.schemas import ChatRequest, CompletionRequest
from edge.service import GenerationRequest

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


def prepare(model: Model, request: ChatRequest | CompletionRequest) -> tuple[GenerationRequest, ...]:
    """Turn a request into token ids and parameters, once for each choice: all of the first prompt, then of the next.

    Takes time in proportion to the prompt: call it in a worker thread where an event loop must stay responsive.

    Raises:
        ModelNotFoundError: the request names another model, or an adapter that is not there.
        RequestError: the messages do not suit the template, a parameter is out of range, or the grammar is not usable.
    """
    adapter = model.find_adapter(request.model)
    if (grammar := requested_grammar(request)) is not None:
        model.check_grammar(grammar)
    stop = request.stop or ()
    prototype = GenerationRequest(
        prompt_ids=(),
        prepared_for=model,
        sampling=model.sampling(_given_sampling(request)),
        max_tokens=request.token_limit,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=bool(request.ignore_eos),
        num_logprobs=request.num_logprobs,
        score_prompt=request.scores_prompt,
        adapter=adapter,
        grammar=grammar,
    )
    prompts = (
        [_chat_ids(model, request, thinks=grammar is None)]
        if isinstance(request, ChatRequest)
        else [_completion_ids(model, prompt) for prompt in request.prompts]
    )
    return tuple(
        _nth_choice(replace(prototype, prompt_ids=prompt_ids), number)
        for prompt_ids in prompts
        for number in range(request.num_choices)
    )


def _chat_ids(model: Model, request: ChatRequest, *, thinks: bool) -> tuple[int, ...]:
    # Templates test whether tools are defined: no tools are None, not an empty list.
    tools = [tool.model_dump(exclude_unset=True) for tool in request.offered_tools] or None
    return model.encode_chat(request.messages, tools=tools, enable_thinking=request.thinking if thinks else False)


def _completion_ids(model: Model, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(model.tokenizer.encode(prompt, special=True)) if isinstance(prompt, str) else prompt


def _given_sampling(request: ChatRequest | CompletionRequest) -> dict[str, Any]:
    given = {name: getattr(request, name) for name in _SAMPLING}
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
