"""Tokenizing, detokenizing and templating, in the forms of llama.cpp [1], vLLM [2] and SGLang, where they agree.

They name the same things differently: a request may use the names of either, an answer carries both.

[1] https://github.com/ggml-org/llama.cpp/tree/master/tools/server
[2] https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from edge.errors import RequestError
from edge.model import Model
from edge.openai.schemas import MAX_MESSAGES, MAX_NAME, ChatRequest, Tool
from edge.openai.wire import Wire, validate


class TokenizeRequest(Wire):
    """Body of ``POST /tokenize``: one of the texts, or a conversation."""

    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    content: str | None = None
    """The text, as llama.cpp calls it."""
    prompt: str | None = None
    """The text, as vLLM calls it."""
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    """A conversation, which becomes the prompt of a chat."""
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    parse_special: bool | None = None
    """Whether ``<|im_end|>`` in the text means the special token; it does unless this is false."""
    with_pieces: bool | None = None
    """Give each token its text too, as llama.cpp does."""
    return_token_strs: bool | None = None
    """The same in vLLM's way."""

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if sum(value is not None for value in (self.content, self.prompt, self.messages)) != 1:
            hint = "send content, prompt or messages"
            raise RequestError("there is not one text", hint=hint, param="content")
        return self


class DetokenizeRequest(Wire):
    """Body of ``POST /detokenize``."""

    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    tokens: list[int]


def parse_tokenize(body: Mapping[str, Any]) -> TokenizeRequest:
    """Check the body of a request to tokenize.

    Raises:
        RequestError: a field is missing or of the wrong type; ``param`` names it.
    """
    return validate(TokenizeRequest, body)


def parse_detokenize(body: Mapping[str, Any]) -> DetokenizeRequest:
    """Check the body of a request to detokenize.

    Raises:
        RequestError: a field is missing or of the wrong type; ``param`` names it.
    """
    return validate(DetokenizeRequest, body)


def tokenize(model: Model, request: TokenizeRequest) -> dict[str, Any]:
    """The token ids of a text or a conversation.

    Raises:
        ModelNotFoundError: the request names another model.
        RequestError: the messages do not suit the template.
    """
    model.find_adapter(request.model)
    ids = _ids(model, request)
    texts = [model.tokenizer.token_bytes(token_id) for token_id in ids]
    pieces = [{"id": token_id, "piece": _piece(text)} for token_id, text in zip(ids, texts, strict=True)]
    strings = [text.decode("utf-8", errors="replace") for text in texts] if request.return_token_strs else None
    return {
        "tokens": pieces if request.with_pieces else ids,
        "count": len(ids),
        "max_model_len": model.context_length,
        "token_strs": strings,
    }


def detokenize(model: Model, request: DetokenizeRequest) -> dict[str, Any]:
    """The text of token ids, special tokens included; parts of characters read U+FFFD.

    Raises:
        ModelNotFoundError: the request names another model.
        RequestError: an id is outside the vocabulary.
    """
    model.find_adapter(request.model)
    most = model.manifest.vocab_size - 1
    if any(not 0 <= token_id <= most for token_id in request.tokens):
        raise RequestError("a token id is outside the vocabulary", hint=f"use ids from 0 to {most}", param="tokens")
    text = model.tokenizer.decode(request.tokens, skip_special=False)
    return {"content": text, "prompt": text}


def apply_template(model: Model, request: ChatRequest) -> dict[str, Any]:
    """The prompt that a chat request becomes, as text.

    Raises:
        ModelNotFoundError: the request names another model.
        RequestError: the messages do not suit the template, or the model has none.
    """
    model.find_adapter(request.model)
    tools = [tool.model_dump(exclude_unset=True) for tool in request.offered_tools] or None
    ids = model.encode_chat(request.messages, tools=tools, enable_thinking=request.thinking)
    return {"prompt": model.tokenizer.decode(ids, skip_special=False)}


def _ids(model: Model, request: TokenizeRequest) -> list[int]:
    if request.messages is not None:
        tools = [tool.model_dump(exclude_unset=True) for tool in request.tools or ()] or None
        opens = request.add_generation_prompt is not False
        return list(model.encode_chat(request.messages, tools=tools, add_generation_prompt=opens))
    text = request.content if request.content is not None else request.prompt or ""
    return model.tokenizer.encode(text, special=request.parse_special is not False)


def _piece(raw: bytes) -> str | list[int]:
    """A token's text, or its bytes where it is a part of a character."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)
