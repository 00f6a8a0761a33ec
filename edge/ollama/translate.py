"""From Ollama's requests to OpenAI's, so that there is one way for tools, schemas and sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge.errors import ContextOverflowError
from edge.model import Model
from edge.ollama.schemas import ChatBody, EmbedBody, GenerateBody, Message, Options
from edge.openai import ChatRequest, CompletionRequest, parse_chat, parse_completion, prepare
from edge.openai.embeddings import EmbeddingRequest, parse_embedding
from edge.service import GenerationRequest

_LATEST = ":latest"
OPTION_OF = {"repetition_penalty": "repeat_penalty"}
"""Field of OpenAI's requests -> the option that is called differently."""


def served_name(name: str) -> str:
    """A model's name without the tag that Ollama's clients give to every name: ``latest`` stands for the model itself.

    Another tag stays: it names an adapter.
    """
    return name.removesuffix(_LATEST)


def tagged_name(name: str) -> str:
    """A served name as Ollama's clients expect it, with a tag."""
    return name if ":" in name else name + _LATEST


def to_openai(model: Model, request: ChatBody | GenerateBody) -> ChatRequest | CompletionRequest:
    """The same request as OpenAI's clients would send it.

    Raises:
        RequestError: a field has a value that no such request can have.
    """
    shared = _shared(request)
    if isinstance(request, ChatBody):
        turns = [_turn(message) for message in request.messages or ()]
        return _chat(request, shared | {"messages": turns, "tools": request.tools or None})
    if request.raw or request.suffix or model.template is None:
        num_alternatives = (request.top_logprobs or 0) if request.logprobs else None
        prompt = {"prompt": request.prompt or "", "suffix": request.suffix or None, "logprobs": num_alternatives}
        return parse_completion(_given(shared | prompt))
    system = [{"role": "system", "content": request.system}] if request.system else []
    return _chat(request, shared | {"messages": [*system, {"role": "user", "content": request.prompt}]})


def to_embedding(model: Model, request: EmbedBody) -> EmbeddingRequest:
    """The same request for embeddings as OpenAI's clients would send it, with the texts as token ids.

    Raises:
        RequestError: there are no texts, or too many; or one is empty.
    """
    texts = [request.input] if isinstance(request.input, str) else request.input
    most = None if request.truncate is False else model.context_length
    ids = [model.tokenizer.encode(text, special=False)[:most] for text in texts]
    fields = {"model": served_name(request.model), "input": ids, "dimensions": request.dimensions}
    return parse_embedding(_given(fields))


def generation_of(model: Model, request: ChatRequest | CompletionRequest, options: Options) -> GenerationRequest:
    """What the service is to generate.

    Raises:
        ContextOverflowError: the prompt does not fit into ``num_ctx``.
        QwedgeError: what :func:`edge.openai.prepare` raises.
    """
    (generation,) = prepare(model, request)
    if options.num_ctx is None or options.num_ctx >= model.context_length:
        return generation
    room = options.num_ctx - len(generation.prompt_ids)
    if room < 1:
        raise ContextOverflowError(len(generation.prompt_ids), options.num_ctx, "send a larger num_ctx")
    return replace(generation, max_tokens=min(room, generation.max_tokens or room))


def _chat(request: ChatBody | GenerateBody, fields: dict[str, Any]) -> ChatRequest:
    alternatives = {"logprobs": request.logprobs, "top_logprobs": request.top_logprobs}
    name = "reasoning_effort" if isinstance(request.think, str) else "enable_thinking"
    return parse_chat(_given(fields | alternatives | {name: request.think}))


def _shared(request: ChatBody | GenerateBody) -> dict[str, Any]:
    """Fields that chats and completions share."""
    given = request.given_options.model_dump(exclude={"num_ctx", "num_predict"})
    given |= {field: given.pop(option) for field, option in OPTION_OF.items()}
    limit = request.given_options.num_predict
    return {
        "model": served_name(request.model),
        "max_tokens": limit if limit is not None and limit > 0 else None,
        "response_format": _response_format(request.format),
        **given,
    }


def _response_format(form: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if not form:
        return None
    if isinstance(form, dict):
        return {"type": "json_schema", "json_schema": {"schema": form}}
    return {"type": "json_object"}


def _turn(message: Message) -> dict[str, Any]:
    turn = {
        "role": message.role,
        "content": message.content or "",
        "reasoning_content": message.thinking or None,
        "tool_calls": message.tool_calls or None,
        "name": message.tool_name,
        "tool_call_id": message.tool_call_id,
    }
    return _given(turn)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
