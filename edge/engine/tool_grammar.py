"""Grammars of tool calls, in the two forms of Qwen's models: ``edge.openai.blocks`` reads what they let through."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from edge.engine.argument_types import (
    fixed_values,
    is_bare,
    parameters_of,
    resolve,
    type_of,
    types_of,
    written,
)

Form = Literal["json", "xml"]
"""``{"name": ..., "arguments": {...}}`` of Qwen2.5 and Qwen3, or the XML of Qwen3-Coder and Qwen3.5."""
HowMany = Literal["one", "some", "any", "at_most_one"]
"""Calls and nothing else: one, or one and more; or text with calls in it: any number, or one at the end."""

_STARTS: Mapping[HowMany, str] = {
    "one": 'start: "<tool_call>" call',
    "some": 'start: "<tool_call>" call ("\\n<tool_call>" call)*',
    "any": "start: (text_and_tag call)* TEXT",
    "at_most_one": "start: TEXT | text_and_tag call",
}
_TEXT = ["TEXT: /(?s:.*)/", "text_and_tag[lazy]: /(?s:.*)<tool_call>/"]
_BARE_OBJECT = frozenset({"type", "properties", "required", "additionalProperties"})
_IGNORED = frozenset(
    {"title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id", "strict"}
)
_DEFINITIONS = frozenset({"$defs", "definitions"})
_DATE = (
    "([1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|"
    "02-(0[1-9]|1[0-9]|2[0-8]))|[1-9][0-9](0[48]|[2468][048]|[13579][26])-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "email": r"[A-Za-z0-9_%+-]{1,64}(\.[A-Za-z0-9_%+-]{1,64}){0,3}@[A-Za-z0-9]{1,63}(\.[A-Za-z0-9]{2,63}){1,4}",
}
"""What is exact enough to be valid; not all that is."""


def tool_grammar(form: Form, how_many: HowMany, functions: Mapping[str, Any], style: Mapping[str, Any]) -> str:
    """The grammar in llguidance's Lark notation.

    Args:
        form: of a call.
        how_many: calls, and what may stand beside them.
        functions: name to the JSON schema of the arguments.
        style: llguidance's options for the JSON in it.

    Raises:
        ValueError: a schema says something that the form cannot be held to.
    """
    write: Callable[[int, str, Any, Mapping[str, Any]], Iterator[str]] = _json_call if form == "json" else _xml_call
    lines = [_STARTS[how_many], *(_TEXT if how_many in {"any", "at_most_one"} else [])]
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, (name, schema) in enumerate(functions.items()):
        if resolve(schema, schema).get("type", "object") != "object":
            raise ValueError("the arguments of a function are an object")
        lines += write(index, name, schema, style)
    return "\n".join(lines)


def literal(text: str) -> str:
    """A string of a Lark grammar."""
    return json.dumps(text)


def _json_call(index: int, name: str, schema: Any, style: Mapping[str, Any]) -> Iterator[str]:
    head = f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
    yield f"call_{index}: {literal(head)} arguments_{index} {literal('}' + chr(10) + '</tool_call>')}"
    # Each schema is a document of its own, so that its references keep their meaning.
    yield f"arguments_{index}: %json {json.dumps({**_closed(schema), 'x-guidance': style})}"


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A model has no use for parameters that nobody has described, even where a schema does not forbid them."""
    if not schema.keys() <= _BARE_OBJECT | _IGNORED | _DEFINITIONS:
        return schema
    return {"type": "object", **({"additionalProperties": False} if schema.get("properties") else {}), **schema}


def _xml_call(index: int, name: str, schema: Any, style: Mapping[str, Any]) -> Iterator[str]:
    _check_name(name)
    root = resolve(schema, schema)
    parts: list[str] = []
    lines: list[str] = []
    _check_object(root)
    if root.get("properties"):
        required = root.get("required", ())
        for number, (parameter, value) in enumerate(parameters_of(schema).items()):
            _check_name(parameter)
            rule = f"parameter_{index}_{number}"
            parts.append(rule if parameter in required else f"{rule}?")
            lines += _parameter(rule, parameter, value, schema, style)
    elif (others := root.get("additionalProperties", True)) is not False:
        if others is not True:
            raise ValueError("parameters without names cannot be held to a schema in this model's form of calls")
        parts.append(f"any_{index}*")
        lines.append(f'any_{index}: "<parameter=" /[A-Za-z_][A-Za-z0-9_.-]{{0,63}}/ ">\\n" value_{index}')
        lines += _text_value(f"value_{index}", "(?s:.*)")
    head = literal(f"\n<function={name}>\n")
    yield " ".join([f"call_{index}:", head, *parts, literal("</function>\n</tool_call>")])
    yield from lines


def _parameter(
    rule: str, name: str, schema: dict[str, Any], root: Mapping[str, Any], style: Mapping[str, Any]
) -> Iterator[str]:
    yield f"{rule}: {literal(f'<parameter={name}>' + chr(10))} {rule}_value"
    types = types_of(schema, root)
    if (values := fixed_values(schema)) is not None:
        choices = " | ".join(literal(f"{text}\n</parameter>\n") for text in map(_written_once(values), values))
        yield f"{rule}_value: {choices}"
    elif types == {"string"}:
        yield from _text_value(f"{rule}_value", _string_pattern(schema))
    elif "string" in types:
        if not is_bare(schema, root):
            raise ValueError(f"{name}: text or something else, with more said of it, has no unambiguous form")
        yield from _text_value(f"{rule}_value", "(?s:.*)")
    else:
        definitions = {key: root[key] for key in _DEFINITIONS if key in root}
        own = json.dumps({**schema, **definitions, "x-guidance": style})
        yield f"{rule}_value: {rule}_json {literal(chr(10) + '</parameter>' + chr(10))}"
        yield f"{rule}_json: %json {own}"


def _text_value(rule: str, pattern: str) -> Iterator[str]:
    """Text up to the first end tag in a line of its own."""
    yield rf"{rule}[lazy]: /({pattern})\n<\/parameter>\n/"


def _string_pattern(schema: Mapping[str, Any]) -> str:
    """The regular expression of a string's values.

    Raises:
        ValueError: the schema says something else of it too, or several things at once.
    """
    said = schema.keys() - _IGNORED - {"type"}
    if not said:
        return "(?s:.*)"
    if said <= {"minLength", "maxLength"} and all(type(schema[name]) is int and schema[name] >= 0 for name in said):
        return f"(?s:.){{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
    if said == {"pattern"} and isinstance(schema["pattern"], str):
        return _searched(schema["pattern"])
    if said == {"format"} and str(schema["format"]) in _FORMATS:
        return _FORMATS[str(schema["format"])]
    raise ValueError(f"strings cannot be held to {', '.join(sorted(said))} in this model's form of calls")


def _searched(pattern: str) -> str:
    """A schema's pattern may match anywhere; a grammar's matches the whole."""
    start = "" if pattern.startswith("^") else "(?s:.*)"
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inner = pattern.removeprefix("^")
    inner = inner if end else inner.removesuffix("$")
    # A slash would end the expression in the grammar.
    escaped = re.sub(r"(?<!\\)/", r"\\/", inner)
    return f"{start}({escaped}){end}"


def _written_once(values: Sequence[Any]) -> Callable[[Any], str]:
    """How each value is written, where that tells them apart.

    Raises:
        ValueError: two values look alike, or there are none.
    """
    if not values:
        raise ValueError("an enum has no values")
    texts = [written(value) for value in values]
    if len(set(texts)) < len({(type_of(value), text) for value, text in zip(values, texts, strict=True)}):
        raise ValueError("values of an enum look alike without quotes")
    return written


def _check_object(schema: Mapping[str, Any]) -> None:
    said = schema.keys() - _IGNORED - _BARE_OBJECT - _DEFINITIONS
    if said:
        raise ValueError(f"arguments cannot be held to {', '.join(sorted(said))} in this model's form of calls")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ValueError("properties and required are not what they are in a JSON schema")  # noqa: TRY004 - as above
    if any(name not in properties for name in required if isinstance(name, str)):
        raise ValueError("a required parameter is not described")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[^<>\n]{1,256}", name) or name != name.strip():
        raise ValueError("a name has characters that this model's form of calls has no place for")
