"""The grammar a request asks for: OpenAI's ``response_format`` and ``tool_choice``, vLLM's ``structured_outputs`` [1].

[1] https://docs.vllm.ai/en/latest/features/structured_outputs/
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edge.engine.grammar_source import Grammar, Kind
from edge.engine.tool_grammar import Form, HowMany
from edge.errors import RequestError
from edge.model import Model
from edge.openai.schemas import ChatRequest, CompletionRequest, NamedTool, StructuredOutputs

_ANY_OBJECT = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def usable_grammar(model: Model, request: ChatRequest | CompletionRequest) -> Grammar | None:
    """The grammar a request asks for, compiled, or None for free text.

    Calls that the model is free to make are held to the schemas of their tools where that can be done, otherwise to
    their form alone; what a client insists on (``strict``, one call at most) is refused where it cannot be had.

    Raises:
        RequestError: it asks for several, for one together with something that does not go with it, or for one that is
            not usable.
    """
    grammar = requested_grammar(request, "json" if model.template is None else model.template.tool_form)
    if grammar is None:
        return None
    try:
        model.check_grammar(grammar)
    except RequestError:
        if not grammar.leaves_text or not isinstance(request, ChatRequest) or request.insists_on_tools:
            raise
        return _loosest(model, grammar)
    return grammar


def asks_for_form(request: ChatRequest | CompletionRequest) -> bool:
    """Whether the answer is to follow a grammar, which may take a while to compile."""
    offers_tools = isinstance(request, ChatRequest) and bool(request.offered_tools)
    return offers_tools or any(value is not None for _param, _kind, value in _candidates(request))


def _loosest(model: Model, grammar: Grammar) -> Grammar | None:
    source = json.loads(grammar.source)
    source["functions"] = dict.fromkeys(source["functions"], _ANY_OBJECT)
    loose = replace(grammar, source=json.dumps(source))
    try:
        model.check_grammar(loose)
    except RequestError:
        return None
    return loose


def requested_grammar(request: ChatRequest | CompletionRequest, form: Form) -> Grammar | None:
    """The grammar a request asks for, or None for free text.

    Args:
        request: what the client sent.
        form: of the model's tool calls.

    Raises:
        RequestError: it asks for several, or for one together with something that does not go with it.
    """
    grammars = [
        Grammar(kind, value if isinstance(value, str) else json.dumps(value), param)
        for param, kind, value in _candidates(request)
        if value is not None
    ]
    if isinstance(request, ChatRequest) and request.offered_tools:
        if not request.forced_tools and grammars:
            hint = "set tool_choice to 'none', or describe the answer by a tool and set tool_choice to 'required'"
            raise RequestError("this form of answer leaves no room for tool calls", hint=hint, param=grammars[0].param)
        grammars.append(_tool_grammar(request, form))
    if len(grammars) > 1:
        hint = f"send {grammars[0].param} or {grammars[1].param}"
        raise RequestError("an answer follows one grammar only", hint=hint, param=grammars[1].param)
    return grammars[0] if grammars else None


def _tool_grammar(request: ChatRequest, form: Form) -> Grammar:
    forced = request.forced_tools
    one = request.parallel_tool_calls is False
    how_many: HowMany = "at_most_one" if one else "any"
    if forced:
        how_many = "one" if one or isinstance(request.tool_choice, NamedTool) else "some"
    tools = [tool.function for tool in forced or request.offered_tools]
    functions = {function.name: function.parameters or _NO_ARGUMENTS for function in tools}
    source = {"form": form, "how_many": how_many, "functions": functions}
    return Grammar("tool_calls", json.dumps(source), "tools", leaves_text=not forced)


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
