"""From a request for a response to the chat that it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from edge.errors import RequestError
from edge.openai.responses.schemas import FunctionTool, NamedFunction, ResponseRequest, TextFormat
from edge.openai.schemas import SAMPLING_FIELDS, ChatRequest, parse_chat

_LOGPROBS = "message.output_text.logprobs"
_SAME = ("model", *SAMPLING_FIELDS, "parallel_tool_calls", "enable_thinking", "thinking_budget")
"""Fields that a chat has under the same name."""
_NAMES = {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}
"""Fields of a chat that a response has under another name."""
_TEXT_PARTS = ("input_text", "output_text", "text")
_SYSTEM = frozenset({"system", "developer"})
_ROLES = frozenset({*_SYSTEM, "user", "assistant"})


def to_chat(request: ResponseRequest) -> ChatRequest:
    """The chat that a response continues.

    Raises:
        RequestError: an item is malformed or of a kind that this model does not take, or the chat is not acceptable;
            ``param`` names a field of the response.
    """
    body = {name: getattr(request, name) for name in _SAME}
    body["messages"] = list(_messages(request))
    body["max_completion_tokens"] = request.max_output_tokens
    body["tools"] = [_tool(tool) for tool in request.tools or ()] or None
    body["tool_choice"] = _tool_choice(request) if request.tools else None
    body["reasoning_effort"] = request.reasoning.effort if request.reasoning else None
    if request.text and request.text.format:
        body["response_format"] = _response_format(request.text.format)
    if _LOGPROBS in (request.include or ()) or request.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    with own_names():
        return parse_chat(body)


@contextmanager
def own_names() -> Iterator[None]:
    """Errors about the chat name the fields of the response."""
    try:
        yield
    except RequestError as error:
        error.param = _NAMES.get(error.param or "", error.param)
        raise


def _messages(request: ResponseRequest) -> Iterator[dict[str, Any]]:
    items = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    messages = [_message(item, f"input[{index}]") for index, item in enumerate(items)]
    # Templates want one system message, and that first.
    num_system = next((i for i, message in enumerate(messages) if message["role"] not in _SYSTEM), len(messages))
    system = [request.instructions or "", *(message["content"] for message in messages[:num_system])]
    if any(system):
        yield {"role": "system", "content": "\n\n".join(filter(None, system))}
    yield from _joined(messages[num_system:])


def _joined(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Reasoning, text and calls of one turn are one message of the assistant's."""
    turn: dict[str, Any] | None = None
    for message in messages:
        if message["role"] != "assistant":
            if turn is not None:
                yield turn
            turn = None
            yield message
        elif turn is None or ("tool_calls" in turn and "tool_calls" not in message):
            if turn is not None:
                yield turn
            turn = dict(message)
        else:
            turn = _extended(turn, message)
    if turn is not None:
        yield turn


def _extended(turn: Mapping[str, Any], message: Mapping[str, Any]) -> dict[str, Any]:
    result = {**turn, **message, "content": turn.get("content", "") + message.get("content", "")}
    if "tool_calls" in message:
        result["tool_calls"] = [*turn.get("tool_calls", ()), *message["tool_calls"]]
    return result


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    match item.get("type", "message"):
        case "message":
            role = item.get("role")
            if not isinstance(role, str) or role not in _ROLES:
                raise _refusal(f"{where}.role", f"use one of {', '.join(sorted(_ROLES))}")
            return {"role": role, "content": _text(item.get("content"), f"{where}.content")}
        case "function_call":
            function = {name: _string(item, name, where) for name in ("name", "arguments")}
            call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
            return {"role": "assistant", "tool_calls": [call]}
        case "function_call_output":
            call_id = _string(item, "call_id", where)
            return {"role": "tool", "tool_call_id": call_id, "content": _text(item.get("output"), f"{where}.output")}
        case "reasoning":
            parts = item.get("content") or ()
            return {"role": "assistant", "reasoning_content": _text(parts, f"{where}.content", ("reasoning_text",))}
        case _:
            raise _refusal(f"{where}.type", "send messages, function calls, their outputs, and reasoning")


def _text(content: object, where: str, kinds: tuple[str, ...] = _TEXT_PARTS) -> str:
    """A string, or the texts of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise _refusal(where, "send a string or a list of parts")
    texts = [_part_text(part, kinds) for part in content]
    if None in texts:
        raise _refusal(where, "this model reads text alone")
    return "".join(filter(None, texts))


def _part_text(part: object, kinds: tuple[str, ...]) -> str | None:
    text = part.get("text") if isinstance(part, dict) and part.get("type") in kinds else None
    return text if isinstance(text, str) else None


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise _refusal(f"{where}.{name}", "send a string")
    return value


def _refusal(param: str, hint: str) -> RequestError:
    return RequestError(f"{param} is missing or not acceptable", hint=hint, param=param)


def _tool(tool: FunctionTool) -> dict[str, Any]:
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {"type": "function", "function": {name: value for name, value in fields.items() if value is not None}}


def _tool_choice(request: ResponseRequest) -> Any:
    if isinstance(request.tool_choice, NamedFunction):
        return {"type": "function", "function": {"name": request.tool_choice.name}}
    return request.tool_choice


def _response_format(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    if wanted.definition is None:
        raise _refusal("text.format.schema", "send a JSON schema")
    return {"type": "json_schema", "json_schema": {"schema": wanted.definition}}
