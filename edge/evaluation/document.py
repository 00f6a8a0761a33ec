"""YAML into plain values, strictly, and where in the file each of them stands.

Only what JSON could say is read, by the rules of YAML 1.2: ``no`` and ``12:30`` are strings, nothing becomes a date. No
tags, no aliases (a few hundred bytes of them can stand for gigabytes), no key twice, and limits on size, depth and the
number of values. So a suite from anywhere can be read; what it may ask for, :mod:`edge.evaluation.schema` decides.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from edge.errors import ConfigError

MAX_BYTES = 256 << 10
"""Some seconds of parsing on a small board."""
MAX_NODES = 100_000
MAX_DEPTH = 32
_MAX_DIGITS = 64
_HINT = "see docs/evaluation.md for the format"

Path = tuple[str | int, ...]
"""Keys and indices from the root to a value."""


@dataclass(frozen=True)
class Document:
    """What a file says."""

    name: str
    """As messages name it."""
    value: Any
    """Of dicts, lists, strings, numbers, booleans and None."""
    lines: dict[Path, int]
    """Of every value, from 1."""

    def error(self, path: Path, reason: str, *, hint: str = _HINT) -> ConfigError:
        """An error at a value, or at the closest one around it that is there."""
        while path not in self.lines and path:
            path = path[:-1]
        return ConfigError(f"{self.name}, line {self.lines.get(path, 1)}: {reason}", hint=hint)


def read_document(name: str, data: bytes) -> Document:
    """Read a file's content.

    Args:
        name: the file's, for messages.
        data: its bytes, UTF-8.

    Raises:
        ConfigError: it is too large, no UTF-8, no YAML, or says what is not allowed.
    """
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_BYTES >> 10} KiB", hint="keep the cases in a .jsonl file")
    try:
        text = data.decode("utf-8-sig")
        node = _Composer(text).get_single_node()
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not UTF-8 text", hint="save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise ConfigError(f"{name}, line {line}: {error.problem}", hint=_HINT) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no YAML: {' '.join(str(error).split())}", hint=_HINT) from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply", hint=_HINT) from None
    if node is None:
        raise ConfigError(f"{name} is empty", hint=_HINT)
    reader = _Reader(name)
    return Document(name, reader.value(node, ()), reader.lines)


class _Composer(yaml.SafeLoader):  # type: ignore[misc] # yaml has no types
    """The parser without aliases, and with JSON's idea of what a plain scalar is."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - typed as yaml has it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse("aliases are not allowed: write the value out", event)
        if getattr(event, "tag", None) is not None:
            self._refuse(f"the tag {event.tag!r} is not allowed", event)
        return super().compose_node(parent, index)

    def _refuse(self, reason: str, event: yaml.Event) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, reason, event.start_mark)


_Composer.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Composer.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Composer.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Composer.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


class _Reader:
    """Turns the parser's nodes into values."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.lines: dict[Path, int] = {}

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.lines[path] = node.start_mark.line + 1
        if len(self.lines) > MAX_NODES:
            raise self._error(node, f"there are more than {MAX_NODES} values")
        if len(path) > MAX_DEPTH:
            raise self._error(node, f"values are nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*path, index)) for index, child in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, child in node.value:
            key: Hashable = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise self._error(key_node, "a key must be a string")
            if key in found:
                raise self._error(key_node, f"the key {key!r} is there twice")
            found[key] = self.value(child, (*path, key))
        return found

    def _scalar(self, node: yaml.Node) -> Any:
        kind, text = node.tag.rpartition(":")[2], node.value
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int" | "float" if len(text) > _MAX_DIGITS:
                raise self._error(node, f"a number has more than {_MAX_DIGITS} digits")
            case "int":
                return int(text)
            case "float":
                number = float(text)
                if abs(number) == float("inf"):
                    raise self._error(node, "a number is too large")
                return number
        return text

    def _error(self, node: yaml.Node, reason: str) -> ConfigError:
        return ConfigError(f"{self._name}, line {node.start_mark.line + 1}: {reason}", hint=_HINT)
