"""Conversations to prompts, by the model's own chat template.

Templates are Jinja as ``transformers`` runs it [1], rendered by minijinja with a limit on the work. A template comes
from the verified bundle; the messages come from anywhere, so no text in them can become a special token: a user who
writes ``<|im_end|>`` is quoted, not obeyed (:meth:`ChatTemplate.encode`).

[1] https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

import minijinja

from edge.engine.tool_grammar import Form
from edge.errors import BundleError, RequestError
from edge.tokenizer import Tokenizer

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Role of a message to the role that templates know."""
MAX_DEPTH = 32
"""Levels of nesting in tools and tool calls."""
FUEL = 1_000_000
"""Template instructions for one rendering: more than 4,000 messages with tool calls, and less than 0.1 s."""
_NAME = "chat"
_Shield = Callable[[str], str]


_PROBE: Sequence[Mapping[str, Any]] = ({"role": "user", "content": "?"},)
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "?", "parameters": {"type": "object"}}}


class ChatTemplate:
    """A model's chat template. Thread-safe.

    Attributes:
        thinks: whether the model thinks first: never, as it is told, or always.
        tool_form: how the model writes a tool call.

    Args:
        source: the template, Jinja.

    Raises:
        BundleError: the template is malformed or cannot render even a one-line conversation.
    """

    def __init__(self, source: str) -> None:
        self._environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            pycompat=True,
            debug=False,
            fuel=FUEL,
            filters={"tojson": _to_json},
            globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        )
        hint = "export the bundle again with the model's own template"
        try:
            self._environment.add_template(_NAME, source)
        except minijinja.TemplateError as error:
            raise BundleError(f"the chat template is malformed: {error.message}", hint=hint) from None
        try:
            self.thinks = self._find_thoughts(self.render(_PROBE))
        except RequestError as error:
            raise BundleError(f"the chat template does not work: {error.message}", hint=hint) from None
        self.tool_form = self._find_tool_form()

    def _find_thoughts(self, prompt: str) -> Literal["never", "optional", "always"]:
        # Some think by default and some do not: Qwen3.5 does from 4B on.
        if self.render(_PROBE, enable_thinking=False) != self.render(_PROBE, enable_thinking=True):
            return "optional"
        return "always" if prompt.endswith("<think>\n") else "never"

    def _find_tool_form(self) -> Form:
        """A template shows the model the form of a call beside the tools."""
        try:
            shown = self.render(_PROBE, tools=[_PROBE_TOOL])
        except RequestError:
            return "json"  # it knows no tools
        return "xml" if "<function=" in shown else "json"

    @classmethod
    def load(cls, path: Path) -> ChatTemplate:
        """Read a ``chat_template.jinja``.

        Raises:
            BundleError: the file cannot be read or the template does not work.
        """
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path} cannot be read: {error}", hint="export or copy the bundle again") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        continue_final_message: bool | None = None,
    ) -> str:
        """The prompt as text, to look at; :meth:`encode` makes the prompt that the model gets.

        Args:
            messages: OpenAI's form: ``role``; ``content`` as a string, null or a list of text parts, which are joined
                without a separator; ``reasoning_content``, ``tool_calls``, ``tool_call_id`` and ``name`` where they
                apply. Other fields are ignored.
            tools: OpenAI's form: ``{"type": "function", "function": {"name": ..., "parameters": ...}}``.
            add_generation_prompt: open the assistant's turn at the end.
            enable_thinking: what the template gets under this name; None leaves it undefined, the model's default.
            continue_final_message: leave the last message open, so that the model writes on from its last character.
                None does so where the assistant's turn would be opened and the last message already is the
                assistant's and calls no tool.

        Raises:
            RequestError: a message has the wrong form, the template refuses the conversation, or rendering it takes
                too much work.
        """
        return self._render(messages, tools, add_generation_prompt, enable_thinking, continue_final_message, shield=str)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        continue_final_message: bool | None = None,
    ) -> list[int]:
        """The prompt as token ids; arguments as for :meth:`render`.

        The ids are those of the rendered text, but special tokens written in messages and tools are encoded as the
        ordinary characters they consist of. Each is broken apart by a random mark before the template runs, and the
        mark is removed once the template's own special tokens were found. The text between two special tokens stays
        in one piece all the while, so no merge across the border of a message changes.

        Raises:
            RequestError: see :meth:`render`.
        """
        mark = _random_mark()
        text = self._render(
            messages,
            tools,
            add_generation_prompt,
            enable_thinking,
            continue_final_message,
            shield=lambda value: tokenizer.shield(value, mark),
        )
        return tokenizer.encode(text, special=True, mark=mark)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        enable_thinking: bool | None,
        continue_final_message: bool | None,
        *,
        shield: _Shield,
    ) -> str:
        conversation: list[dict[str, Any]] = _map_strings(_normalise(messages), shield)
        last = conversation[-1]
        if continue_final_message is None:
            continue_final_message = add_generation_prompt and _is_open(last)
        end = ""
        if continue_final_message:
            if not _is_open(last):
                raise _refusal("only a last message of the assistant's, without tool calls, can be continued")
            end = _random_mark()
            last["content"] += end
        variables: dict[str, Any] = {"messages": conversation, "add_generation_prompt": add_generation_prompt}
        # Left undefined where there is nothing to say, so that a template's own default holds.
        if tools:
            variables["tools"] = _map_strings(tools, shield, param="tools")
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        return self._run(variables, end)

    def _run(self, variables: Mapping[str, Any], end: str) -> str:
        """Render, up to ``end`` where there is one."""
        try:
            text = self._environment.render_template(_NAME, **variables)
        except minijinja.TemplateError as error:
            # The kind alone: a detail may quote the conversation.
            raise _refusal(f"the chat template cannot render this conversation ({error.kind})") from None
        except (TypeError, ValueError, OverflowError) as error:
            # From the filters: a value that has no JSON form.
            raise _refusal(f"the chat template cannot render this conversation ({type(error).__name__})") from None
        prompt, found, _ = text.partition(end) if end else (text, "", "")
        if found != end:
            raise _refusal("this model's chat template cannot continue a message of the assistant's")
        return prompt


def _normalise(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form that templates expect: contents are strings, tool arguments are objects."""
    if not isinstance(messages, list | tuple) or not messages:
        raise _refusal("messages must be a list with at least one message")
    return [_normalise_message(message) for message in messages]


def _normalise_message(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _refusal("a message must be an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _refusal("a message has an unknown role", hint=f"use one of {', '.join(ROLES)}")
    result: dict[str, Any] = {"role": ROLES[role], "content": _join_parts(message.get("content"), role)}
    if role == "assistant" and (calls := message.get("tool_calls")):
        if not isinstance(calls, list | tuple):
            raise _refusal("tool_calls must be a list")
        result["tool_calls"] = [_normalise_call(call) for call in calls]
    for key in ("reasoning_content", "tool_call_id", "name"):
        if (value := message.get(key)) is not None:
            if not isinstance(value, str):
                raise _refusal(f"{key} must be a string")
            result[key] = value
    return result


def _join_parts(content: object, role: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list | tuple):
        raise _refusal("content must be a string or a list of text parts", hint="only the assistant's may be null")
    return "".join(map(_part_text, content))


def _part_text(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise _refusal(
            "content has a part that is not text", hint='this model reads {"type": "text", "text": ...} alone'
        )
    return text


def _normalise_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _refusal("a tool call has no function name", hint='use {"function": {"name": ..., "arguments": ...}}')
    return {"type": "function", "function": {"name": function["name"], "arguments": _arguments(function)}}


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as an object: a template writes them as JSON itself, and would quote a string twice."""
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise _refusal("the arguments of a tool call are no JSON object")
    return arguments


def _is_open(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and "tool_calls" not in message


def _map_strings(value: Any, change: _Shield, *, param: str = "messages", depth: int = MAX_DEPTH) -> Any:
    """A copy of a JSON value in which every string, also as a key, went through ``change``."""
    if depth == 0:
        raise _refusal("the nesting is too deep", hint=f"use at most {MAX_DEPTH} levels", param=param)
    if isinstance(value, str):
        # The template engine would replace what is no Unicode without a word.
        if not _is_unicode(value):
            raise _refusal("a text is not valid Unicode", hint="send UTF-8, without lone surrogates", param=param)
        return change(value)
    if isinstance(value, list | tuple):
        return [_map_strings(item, change, param=param, depth=depth - 1) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        _map_strings(str(key), change, param=param): _map_strings(item, change, param=param, depth=depth - 1)
        for key, item in value.items()
    }


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refusal(message: str, *, hint: str = "", param: str = "messages") -> RequestError:
    return RequestError(message, hint=hint or "check the messages, their order and the tools", param=param)


def _random_mark() -> str:
    """A string that no message contains, short of guessing 100 random bits; private-use characters have no meaning."""
    return "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(8))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The ``tojson`` filter of transformers: plain ``json.dumps``, not Jinja's, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _refusal(f"the chat template refuses this conversation: {message}")


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
