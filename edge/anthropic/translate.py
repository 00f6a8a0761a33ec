"""From Anthropic's requests to OpenAI's, so that there is one way for tools, schemas and sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edge.anthropic.schemas import Block, CountRequest, Message, MessagesRequest, Text, Thought, ToolResult, ToolUse
from edge.openai import ChatRequest, parse_chat

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(request: CountRequest) -> ChatRequest:
    """The same conversation as OpenAI's clients would send it.

    Raises:
        RequestError: a field has a value that no chat request can have.
    """
    sampling = _sampling(request) if isinstance(request, MessagesRequest) else {}
    fields = {
        "model": request.model,
        "messages": [*_system(request), *(turn for message in request.messages for turn in _turns(message))],
        **_thinking(request),
        "response_format": _response_format(request),
        **_tools(request),
        **sampling,
    }
    return parse_chat({name: value for name, value in fields.items() if value is not None})


def _sampling(request: MessagesRequest) -> dict[str, Any]:
    return {
        "max_tokens": request.max_tokens,
        "stop": request.stop_sequences,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stream": request.stream,
    }


def _thinking(request: CountRequest) -> dict[str, Any]:
    thinking = request.thinking
    if thinking is None or thinking.type == "disabled":
        return {"enable_thinking": False}
    effort = request.output_config.effort if request.output_config else None
    return {"enable_thinking": True, "thinking_budget": thinking.budget_tokens, "reasoning_effort": effort}


def _system(request: CountRequest) -> Iterator[dict[str, Any]]:
    if request.system:
        yield {"role": "system", "content": _text(request.system)}


def _text(content: str | Sequence[Text] | None) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content or ())


def _turns(message: Message) -> Iterator[dict[str, Any]]:
    """A message as OpenAI's messages: each tool result becomes one of its own, in its place."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
    elif message.role == "assistant":
        yield _answer(message.content)
    else:
        yield from _question(message.content)


def _question(blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
    texts: list[Text] = []
    for block in blocks:
        if isinstance(block, Text):
            texts.append(block)
        elif isinstance(block, ToolResult):
            if texts:
                yield {"role": "user", "content": _text(texts)}
                texts = []
            failed = "Error: " if block.is_error else ""
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": failed + _text(block.content)}
    if texts:
        yield {"role": "user", "content": _text(texts)}


def _answer(blocks: Sequence[Block]) -> dict[str, Any]:
    calls = [block for block in blocks if isinstance(block, ToolUse)]
    thoughts = "\n".join(block.thinking for block in blocks if isinstance(block, Thought))
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": _text([block for block in blocks if isinstance(block, Text)]),
    }
    if thoughts:
        answer["reasoning_content"] = thoughts
    if calls:
        answer["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.input}}
            for call in calls
        ]
    return answer


def _tools(request: CountRequest) -> dict[str, Any]:
    if not request.tools:
        return {}
    functions = [
        {"name": tool.name, "parameters": tool.input_schema}
        | ({} if tool.description is None else {"description": tool.description})
        for tool in request.tools
    ]
    tools = [{"type": "function", "function": function} for function in functions]
    choice = request.tool_choice
    if choice is None:
        return {"tools": tools}
    named = {"type": "function", "function": {"name": choice.name}}
    parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    return {"tools": tools, "tool_choice": _CHOICES.get(choice.type, named), "parallel_tool_calls": parallel}


def _response_format(request: CountRequest) -> dict[str, Any] | None:
    form = request.output_config.format if request.output_config else None
    return None if form is None else {"type": "json_schema", "json_schema": {"schema": form.definition}}
