"""What does not leave the device: secrets, prompts, and the names of hosts, devices and people.

Settings say of themselves which of them are private (:class:`edge.settings.section.Private`); nothing is guessed from a
field's name. All other texts, such as the log, are searched for the very values that those settings have and that their
files hold, so that one which got there by mistake does not leave either.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edge.config import Settings
from edge.settings.folders import keys_file
from edge.settings.secret_files import find_secret
from edge.settings.section import Private

MAX_SECRET_BYTES: Final = 1 << 20
_WORDS: Final = frozenset({"", "none", "embedded", "localhost", "qwedge", "device"})
"""Values of settings that name nobody."""
_HOST: Final = re.compile(r"(?:[a-z]+://)?(\[[^\]]*\]|[^/:\[\]]+)(?::\d+)?(?:/.*)?", re.IGNORECASE)
_IPV4: Final = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
_MAC: Final = re.compile(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b", re.IGNORECASE)
_MIN_SECRET: Final = 4
"""Characters; what is shorter stands everywhere by chance."""


class Redaction:
    """Takes private values out of texts; the same name becomes the same ``<name N>`` everywhere.

    Args:
        settings: what is private.
        env: the environment, which may say where keys are.
    """

    def __init__(self, settings: Settings, env: dict[str, str]) -> None:
        self._settings = settings
        values = list(_private(settings))
        secrets = sorted(_secrets(settings, values, env), key=len, reverse=True)
        self._exact = dict.fromkeys(secrets, "<secret>") | _home()
        named = {os.uname().nodename.lower()} | {
            name for kind, value in values if kind == "name" for name in _hosts(value)
        }
        numbered = {name: f"<name {number}>" for number, name in enumerate(sorted(named - _WORDS), 1)}
        self._names = {name: numbered[name] for name in sorted(numbered, key=len, reverse=True)}

    def settings(self) -> dict[str, Any]:
        """All settings: private ones as ``<secret>``, ``<prompt>`` or with names replaced; those not given as null."""
        return {name: self._model(getattr(self._settings, name)) for name in type(self._settings).model_fields}

    def text(self, text: str) -> str:
        """A text without private values."""
        for private, instead in self._exact.items():
            text = text.replace(private, instead)
        for name, instead in self._names.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", instead, text, flags=re.IGNORECASE)
        return _MAC.sub("<address>", _IPV4.sub(_hide_address, text))

    def value(self, value: Any) -> Any:
        """A JSON value with :meth:`text` applied to every text in it."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(key)): self.value(each) for key, each in value.items()}
        return [self.value(each) for each in value] if isinstance(value, list) else value

    def _model(self, model: BaseModel) -> dict[str, Any]:
        return {name: self._field(info, getattr(model, name)) for name, info in type(model).model_fields.items()}

    def _field(self, info: FieldInfo, value: Any) -> Any:
        kind = _kind(info)
        if value is None or value == ():
            return value
        if kind in {"secret", "prompt"}:
            return f"<{kind}>"
        if isinstance(value, tuple):
            return [self._model(each) if isinstance(each, BaseModel) else self.value(_plain(each)) for each in value]
        return self.value(_plain(value))


def _home() -> dict[str, str]:
    """The user's name is part of it."""
    with suppress(RuntimeError):  # there is none
        home = str(Path.home())
        return {home: "~"} if len(home) > 1 else {}
    return {}


def _kind(info: FieldInfo) -> str | None:
    return next((mark.kind for mark in info.metadata if isinstance(mark, Private)), None)


def _private(model: BaseModel) -> Iterator[tuple[str, Any]]:
    """Kind and value of every private setting that is given, however deep."""
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        kind = _kind(info)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, BaseModel):
                yield from _private(each)
            elif kind is not None and each is not None:
                yield kind, each


def _hosts(value: Any) -> Iterator[str]:
    """The names in a value: a host, a URL's host, or the value as a whole."""
    text = str(value).lower()
    match = _HOST.fullmatch(text)
    name = match[1].strip("[]") if match else text
    if not _is_nobody(name):
        yield name


def _is_nobody(address: str) -> bool:
    """Whether it is an address of this device itself, or of all."""
    with suppress(ValueError):
        found = ip_address(address)
        return found.is_loopback or found.is_unspecified
    return False


def _secrets(settings: Settings, values: list[tuple[str, Any]], env: dict[str, str]) -> set[str]:
    """What stands in the secrets' files, line by line, and prompts; a setting that names no file may be the secret."""
    prompts = [value for kind, value in values if kind == "prompt" and isinstance(value, str)]
    found = {part.strip() for prompt in prompts for part in (prompt, *prompt.splitlines())}
    paths = [Path(value) for kind, value in values if kind == "secret"]
    found |= {path.name for path in paths if not find_secret(path.expanduser()).exists()}
    for path in [*(find_secret(path.expanduser()) for path in paths), keys_file(settings.server, env)]:
        found |= set(_lines(path))
    return {secret for secret in found if len(secret) >= _MIN_SECRET}


def _lines(path: Path) -> Iterator[str]:
    with suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(MAX_SECRET_BYTES)
        for line in text.splitlines():
            if not line.startswith("-----"):
                yield line.strip()
        yield from re.findall(r"[0-9a-f]{64}", text)  # digests of keys


def _hide_address(match: re.Match[str]) -> str:
    with suppress(ValueError):
        address = ip_address(match[0])
        return match[0] if address.is_loopback or address.is_unspecified else "<address>"
    return match[0]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
