"""The grammar a request asks for: OpenAI's ``response_format`` and ``tool_choice``, vLLM's ``structured_outputs`` [1].

[1] https://docs.vllm.ai/en/latest/features/structured_outputs/
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from edge.engine.grammar_source import Grammar, Kind
from edge.errors import RequestError
from edge.openai.schemas import ChatRequest, CompletionRequest, StructuredOutputs

_ANY_OBJECT = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def requested_grammar(request: ChatRequest | CompletionRequest) -> Grammar | None:
    """The grammar a request asks for, or None for free text.

    Raises:
        RequestError: it asks for several, or for one together with something that does not go with it.
    """
    grammars = [
        Grammar(kind, value if isinstance(value, str) else json.dumps(value), param)
        for param, kind, value in _candidates(request)
        if value is not None
    ]
    if not grammars:
        return None
    if len(grammars) > 1:
        hint = f"send {grammars[0].param} or {grammars[1].param}"
        raise RequestError("an answer follows one grammar only", hint=hint, param=grammars[1].param)
    if isinstance(request, ChatRequest):
        _check_company(request, grammars[0])
    return grammars[0]


def _candidates(request: ChatRequest | CompletionRequest) -> Iterator[tuple[str, Kind, Any]]:
    """Fields, the kind of grammar they hold, and its source; None where the field is not given."""
    if (form := request.response_format) is not None and form.type != "text":
        yield "response_format", "json_schema", form.json_schema.definition if form.json_schema else _ANY_OBJECT
    outputs = request.structured_outputs or StructuredOutputs()
    yield "structured_outputs.json", "json_schema", outputs.definition
    yield "structured_outputs.json_object", "json_schema", _ANY_OBJECT if outputs.json_object else None
    yield "structured_outputs.regex", "regex", outputs.regex
    yield "structured_outputs.grammar", "lark", outputs.grammar
    yield "structured_outputs.choice", "choice", outputs.choice
    yield "guided_json", "json_schema", request.guided_json
    yield "guided_regex", "regex", request.guided_regex
    yield "guided_grammar", "lark", request.guided_grammar
    yield "guided_choice", "choice", request.guided_choice
    if isinstance(request, ChatRequest) and (tools := request.forced_tools):
        schemas = {tool.function.name: tool.function.parameters or _NO_ARGUMENTS for tool in tools}
        yield "tools", "tool_call", schemas


def _check_company(request: ChatRequest, grammar: Grammar) -> None:
    if grammar.kind != "tool_call" and request.offered_tools:
        hint = "set tool_choice to 'none', or describe the answer by a tool and set tool_choice to 'required'"
        raise RequestError("this form of answer leaves no room for tool calls", hint=hint, param=grammar.param)
    if request.thinking:
        hint = "leave enable_thinking or the form of the answer out"
        raise RequestError("an answer in a given form cannot think first", hint=hint, param="enable_thinking")
