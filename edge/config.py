"""Settings: flags over ``QWEDGE_*`` environment variables over a TOML file over defaults.

:func:`load_settings` merges the four and checks the result; what it cannot use is a
:class:`~edge.errors.ConfigError` that names the place (``--port``, ``QWEDGE_SERVER_PORT`` or
``qwedge.toml: [server] port``), the reason and what is allowed. ``docs/configuration.md`` is generated from the classes
of :mod:`edge.settings`.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from edge.errors import ConfigError
from edge.settings.engine import EngineSettings, ModelSettings, SchedulerSettings
from edge.settings.log import LogSettings
from edge.settings.mqtt import MqttSettings
from edge.settings.power import PowerSettings
from edge.settings.rules import RuleSettings
from edge.settings.section import Section
from edge.settings.server import ServerSettings
from edge.settings.upstream import UpstreamSettings
from edge.violations import violation

ENV_PREFIX = "QWEDGE_"
FOREIGN_ENV = frozenset({"QWEDGE_CACHE"})
"""Variables with our prefix that are not settings of the runtime: the exporter's download folder."""
FLAGS = {
    "model.bundle": "--bundle",
    "model.store": "--store",
    "model.trust": "--trust",
    "server.host": "--host",
    "server.port": "--port",
    "engine.threads": "--threads",
    "engine.context": "--context",
    "engine.slots": "--slots",
    "mqtt.broker": "--broker",
    "log.level": "--log-level",
}
"""The settings that have a flag."""
TABLES: dict[str, tuple[type[BaseModel], str]] = {
    "mqtt.rule": (RuleSettings, "mqtt-rules.md"),
    "server.upstream": (UpstreamSettings, "http-security.md"),
}
"""Settings that are lists of tables: the class of one, and the page about it."""
FILE_ONLY = frozenset(TABLES)
"""No flag or variable can hold these."""
MAX_CONFIG_BYTES = 1 << 20


class Settings(Section):
    """All settings, frozen; made by :func:`load_settings`."""

    server: ServerSettings
    model: ModelSettings
    engine: EngineSettings
    scheduler: SchedulerSettings
    power: PowerSettings
    mqtt: MqttSettings
    log: LogSettings


SECTIONS: dict[str, type[BaseModel]] = {
    "server": ServerSettings,
    "model": ModelSettings,
    "engine": EngineSettings,
    "scheduler": SchedulerSettings,
    "power": PowerSettings,
    "mqtt": MqttSettings,
    "log": LogSettings,
}
"""Section name -> its class, in the order of the documentation."""


@dataclass(frozen=True)
class _Given:
    """A value and where it was given, as error messages name it."""

    value: Any
    place: str


def load_settings(
    config_file: Path | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Merge and check all sources of settings.

    Args:
        config_file: a TOML file with one table for each section; None = no file.
        env: the environment; ``QWEDGE_<SECTION>_<FIELD>`` is read, an empty value counts as not given.
        flags: values by setting (``server.port``); None values count as not given.

    Raises:
        ConfigError: the file cannot be read, a key or variable is unknown, or a value is not allowed.
    """
    given: dict[str, _Given] = {}
    given |= _from_file(config_file) if config_file is not None else {}
    given |= _from_environment(env or {})
    given |= {key: _Given(value, FLAGS.get(key, key)) for key, value in (flags or {}).items() if value is not None}
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, entry in given.items():
        section, field = key.split(".")
        merged[section][field] = entry.value
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, given) from None


def environment_name(section: str, field: str) -> str:
    """The variable that sets a field: ``server``, ``port`` -> ``QWEDGE_SERVER_PORT``."""
    return f"{ENV_PREFIX}{section}_{field}".upper()


def _from_file(path: Path) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for section, table in _read_toml(path).items():
        if section not in SECTIONS:
            raise ConfigError(f"{path}: unknown section [{section}]", hint=_did_you_mean(section, SECTIONS))
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} is not a section", hint=f"write [{section}] on a line of its own")
        fields = SECTIONS[section].model_fields
        for field, value in table.items():
            if field not in fields:
                raise ConfigError(f"{path}: [{section}] has no key {field!r}", hint=_did_you_mean(field, fields))
            given[f"{section}.{field}"] = _Given(value, f"{path}: [{section}] {field}")
    return given


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes", hint="is this a settings file?")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="check the path of --config") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text", hint="save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", hint="see docs/configuration.md") from None


def _from_environment(env: Mapping[str, str]) -> dict[str, _Given]:
    keys = {f"{s}.{f}": environment_name(s, f) for s, section in SECTIONS.items() for f in section.model_fields}
    known = {name: key for key, name in keys.items() if key not in FILE_ONLY}
    given: dict[str, _Given] = {}
    for name, value in env.items():
        if not name.startswith(ENV_PREFIX) or name in FOREIGN_ENV:
            continue
        if name not in known:
            raise ConfigError(f"the environment variable {name} is no setting", hint=_did_you_mean(name, known))
        if value.strip():
            given[known[name]] = _Given(value.strip(), name)
    return given


def _explain(error: ValidationError, given: Mapping[str, _Given]) -> ConfigError:
    """The first violation as one line; the rest show up when it is repaired."""
    first = error.errors(include_url=False)[0]
    reason = violation(first["msg"])
    if len(first["loc"]) == 1:
        return ConfigError(f"[{first['loc'][0]}] {reason}", hint="docs/configuration.md lists all settings")
    section, field, *inner = map(str, first["loc"])
    if (key := f"{section}.{field}") in TABLES and inner:
        return _explain_table(key, given[key], first["type"], reason, inner)
    description = SECTIONS[section].model_fields[field].description
    return ConfigError(f"{given[f'{section}.{field}'].place} {reason}", hint=f"{section}.{field}: {description}")


def _explain_table(key: str, given: _Given, kind: str, reason: str, path: Sequence[str]) -> ConfigError:
    """What is wrong with one of several tables; ``path`` is its number and then, where there is one, the key."""
    number, *keys = path
    table, page = TABLES[key]
    fields = {info.alias or name: info for name, info in table.model_fields.items()}
    section, field = key.split(".")
    place = f"{given.place.removesuffix(f' [{section}] {field}')} [[{key}]] number {int(number) + 1}"
    if not keys:
        return ConfigError(f"{place} {reason}", hint=f"see docs/{page}")
    if kind == "extra_forbidden":
        return ConfigError(f"{place} has no key {keys[0]!r}", hint=_did_you_mean(keys[0], fields))
    if kind == "missing":
        reason = "is missing"
    return ConfigError(f"{place}: {keys[0]} {reason}", hint=f"{keys[0]}: {fields[keys[0]].description}")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    names = list(known)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
        return f"did you mean {close[0]}?"
    if len(names) <= 10:
        return f"known are {', '.join(names)}"
    return "docs/configuration.md lists all settings"
