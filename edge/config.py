"""Settings: flags over ``QWEDGE_*`` environment variables over a TOML file over defaults.

:func:`load_settings` merges the four and checks the result; what it cannot use is a
:class:`~edge.errors.ConfigError` that names the place (``--port``, ``QWEDGE_SERVER_PORT`` or
``qwedge.toml: [server] port``), the reason and what is allowed. ``docs/configuration.md`` is generated from the classes
below.
"""

from __future__ import annotations

import difflib
import re
import socket
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge.errors import ConfigError
from edge.rule_settings import MAX_RULES, RuleSettings

ENV_PREFIX = "QWEDGE_"
FOREIGN_ENV = frozenset({"QWEDGE_CACHE"})
"""Variables with our prefix that are not settings of the runtime: the exporter's download folder."""
FLAGS = {
    "model.bundle": "--bundle",
    "server.host": "--host",
    "server.port": "--port",
    "engine.threads": "--threads",
    "engine.context": "--context",
    "engine.slots": "--slots",
    "mqtt.broker": "--broker",
    "log.level": "--log-level",
}
"""The settings that have a flag."""
FILE_ONLY = frozenset({"mqtt.rule"})
"""Settings that are tables: no flag or variable can hold them."""
MAX_CONFIG_BYTES = 1 << 20
DISCOVERY_PREFIX = "homeassistant"
"""Where Home Assistant looks for devices, unless it is told otherwise."""
DISCOVERY_OFF = "off"
"""Value of ``mqtt.home_assistant`` that takes the announcement back."""
_TOPIC = re.compile(r"[^\s+#$/\0]+(/[^\s+#$/\0]+)*")
_BROKER = re.compile(r"(?P<scheme>mqtts?)://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>\d{1,5}))?/?")

Port = Annotated[int, Field(ge=0, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        # pydantic would read `port = true` as 1; no setting stays a boolean.
        if isinstance(value, bool):
            raise ValueError("must not be true or false")  # noqa: TRY004 - pydantic reports ValueErrors only
        return value


class ServerSettings(_Section):
    """The HTTP server."""

    host: str = Field("127.0.0.1", min_length=1, max_length=255, description="Address to listen on.")
    port: Port = Field(8080, description="TCP port to listen on; 0 picks a free one.")
    max_body_bytes: int = Field(
        1 << 20, ge=1 << 10, le=1 << 26, description="Largest request body in bytes; a larger one is answered with 413."
    )
    allowed_hosts: tuple[str, ...] = Field(
        ("localhost",),
        min_length=1,
        max_length=64,
        description="Names that requests may use as Host (without port), against DNS rebinding; plain IP addresses and"
        " the name in `host` are always allowed. Name a device on a network here: `edge-7.local`.",
    )
    drain_s: float = Field(
        10.0,
        ge=0,
        le=600,
        allow_inf_nan=False,
        description="Seconds that running requests get to finish when the server stops.",
    )

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class ModelSettings(_Section):
    """What is served."""

    bundle: Path | None = Field(None, description="The bundle's folder, as `qwedge export` writes it.")
    adapters: Path | None = Field(
        None, description="A folder of further LoRA adapters, each a folder as PEFT saves it; looked at while serving."
    )


class EngineSettings(_Section):
    """The engine: threads and memory."""

    threads: int | None = Field(
        None, ge=1, le=1024, description="Threads of the engine; without it, one for each physical core."
    )
    context: int | None = Field(
        None,
        ge=16,
        le=1 << 20,
        description="Tokens of one conversation; without it, the bundle's or 4096, the smaller.",
    )
    slots: int = Field(
        8, ge=1, le=64, description="Sequences that are worked on at once; their cache takes memory only as it fills."
    )
    kv_cache_mb: int | None = Field(
        None,
        ge=1,
        le=1 << 20,
        description="MiB for keys and values of all sequences at work; when they are used up, the youngest sequence"
        " waits and is computed again later. Without it, `slots` times `context` tokens.",
    )
    prefill_chunk: int = Field(
        256,
        ge=8,
        le=8192,
        description="Prompt tokens read in one step; half of it while answers are running, which pause for as long.",
    )
    draft_tokens: int = Field(
        8,
        ge=0,
        le=60,
        description="Most tokens guessed ahead in one step from the text so far and the grammar, for all sequences"
        " together; 0 never guesses. Answers that copy (code edits, extractions) get faster, and no answer changes.",
    )
    prefix_cache_mb: int = Field(
        64,
        ge=0,
        le=1 << 16,
        description="MiB for keys and values of past prompts, so that a shared system prompt or a growing conversation"
        " is not read again; 0 keeps none.",
    )
    prefix_store: Path | None = Field(
        None,
        description="Folder that keeps past prompts with their keys and values over a restart, for this process alone;"
        " without it, they are kept in memory only.",
    )
    prefix_store_mb: int = Field(
        512, ge=1, le=1 << 20, description="MiB of files in `prefix_store`; the least recently used are removed."
    )
    spin_us: int = Field(
        1000,
        ge=0,
        le=1_000_000,
        description="Microseconds that idle engine threads spin before they sleep; 0 saves power on a battery.",
    )
    sleep_after_s: float | None = Field(
        None,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Seconds without a request after which the weights leave the memory; the next request waits until"
        " they are back. Without it, never.",
    )


class SchedulerSettings(_Section):
    """Admission of requests."""

    max_queue: int = Field(64, ge=1, le=10_000, description="Requests that may wait; the next is answered with 429.")
    default_max_tokens: int | None = Field(
        None, ge=1, le=1 << 20, description="Tokens of an answer whose request names no limit; without it, the context."
    )


@dataclass(frozen=True)
class BrokerAddress:
    """Where an MQTT broker listens."""

    host: str
    port: int
    tls: bool = False


class MqttSettings(_Section):
    """The MQTT side."""

    broker: str = Field(
        "none",
        description="`none`, `embedded` (a mosquitto of our own, on loopback) or a broker's address:"
        " `mqtt://HOST:PORT`, `mqtts://HOST:PORT`.",
    )
    port: int = Field(
        1883, ge=0, le=65535, description="TCP port of the embedded broker on loopback; 0 picks a free one."
    )
    root: str = Field("qwedge", max_length=128, description="First level(s) of every topic.")
    device: str = Field(
        default_factory=lambda: sanitize_device(socket.gethostname()),
        max_length=64,
        description="This device's name in topics; without it, the host's name.",
    )
    client_id: str = Field(
        "qwedge", min_length=1, max_length=64, description="First part of the MQTT client ids; the device follows."
    )
    username: str | None = Field(None, min_length=1, max_length=256, description="User name for the broker.")
    password_file: Path | None = Field(
        None,
        description="File whose first line is the password for the broker. Relative names of this and of the `tls_`"
        " files are systemd's credentials if it gives any (`LoadCredential=`).",
    )
    tls_ca: Path | None = Field(
        None,
        description="PEM file of the CAs that vouch for the broker; without it, the system's. With the embedded broker:"
        " for its clients, who then need a certificate instead of a password.",
    )
    tls_cert: Path | None = Field(
        None, description="PEM file of this device's certificate: for the broker, or for the embedded broker's clients."
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's key, without a passphrase.")
    listen: str = Field(
        "127.0.0.1",
        min_length=1,
        max_length=255,
        description="Address on which the embedded broker listens with TLS, once there is a `tls_cert`; beyond loopback"
        " only if it knows its clients.",
    )
    tls_port: int = Field(
        8883, ge=0, le=65535, description="TCP port of the embedded broker's TLS; 0 picks a free one."
    )
    broker_folder: Path | None = Field(
        None,
        description="Folder of the embedded broker's clients and messages, for this device alone. Without it,"
        " `DEVICE/broker` beside the journal's default.",
    )
    keepalive_s: int = Field(
        10, ge=2, le=3600, description="MQTT keepalive in seconds; a dead link is noticed within twice as long."
    )
    pool: Literal["on", "off"] = Field(
        "off",
        description="`on` takes requests from the pool of all devices at the broker that serve the same model, over a"
        " second connection.",
    )
    pool_slots: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Requests, running and waiting and however they came, at which this device leaves the pool until"
        " some have ended; without it, `engine.slots`.",
    )
    home_assistant: str | None = Field(
        None,
        max_length=128,
        description="`true` announces this device to Home Assistant below `homeassistant`, another word below that;"
        " `false` takes the announcement below `homeassistant` back. Without it, neither.",
    )
    rule: tuple[RuleSettings, ...] = Field(
        (),
        max_length=MAX_RULES,
        description="Answers to messages that are no requests, one table `[[mqtt.rule]]` for each rule.",
    )

    broker_sync: Literal["on", "off"] = Field(
        "off",
        description="`on` has the embedded broker write each change to disk at once, so that its crash loses what it"
        " confirmed in the last moment only, for about 20 kB a request; `off`, every five minutes and when it stops.",
    )

    @field_validator("pool", "broker_sync", mode="before")
    @classmethod
    def _on_off(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("home_assistant", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        word = str(value).lower() if isinstance(value, bool | str) else ""
        return {"true": DISCOVERY_PREFIX, "false": DISCOVERY_OFF}.get(word, value)

    @field_validator("rule")
    @classmethod
    def _own_names(cls, value: tuple[RuleSettings, ...]) -> tuple[RuleSettings, ...]:
        if len({rule.name for rule in value}) < len(value):
            raise ValueError("must have a name of its own for each rule")
        return value

    journal: Path | None = Field(
        None,
        description="Folder that keeps requests and answers over a crash or a power cut, for this device alone;"
        " `none` keeps them in memory only. Without it, `DEVICE/journal` in `$STATE_DIRECTORY`,"
        " `$XDG_STATE_HOME/qwedge` or `~/.local/state/qwedge`.",
    )
    journal_mb: int = Field(
        64, ge=1, le=1 << 16, description="MiB of requests and answers in `journal`; the oldest answers go first."
    )

    @field_validator("broker")
    @classmethod
    def _known_broker(cls, value: str) -> str:
        match = _BROKER.fullmatch(value)
        if value not in {"none", "embedded"} and match is None:
            raise ValueError("must be none, embedded or mqtt://HOST:PORT")
        if match is not None and match["port"] and not 1 <= int(match["port"]) <= 65535:
            raise ValueError("must name a port from 1 to 65535")
        return value

    @field_validator("root", "home_assistant")
    @classmethod
    def _plain_topic(cls, value: str | None) -> str | None:
        if value is not None and _TOPIC.fullmatch(value) is None:
            raise ValueError("must be topic levels without spaces, '+', '#' and '$', and without empty levels")
        return value

    @field_validator("device")
    @classmethod
    def _plain_level(cls, value: str) -> str:
        if value != sanitize_device(value):
            raise ValueError("must be letters, digits, '.', '_' and '-' only")
        return value

    @model_validator(mode="after")
    def _certificate_with_key(self) -> MqttSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("must have both tls_cert and tls_key, or neither")
        return self

    @property
    def address(self) -> BrokerAddress | None:
        """The external broker's address; None for ``none`` and ``embedded``."""
        match = _BROKER.fullmatch(self.broker)
        if match is None:
            return None
        tls = match["scheme"] == "mqtts"
        return BrokerAddress(match["host"].strip("[]"), int(match["port"] or (8883 if tls else 1883)), tls=tls)


class LogSettings(_Section):
    """Logs, written to stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level written.")


class Settings(_Section):
    """All settings, frozen; made by :func:`load_settings`."""

    server: ServerSettings
    model: ModelSettings
    engine: EngineSettings
    scheduler: SchedulerSettings
    mqtt: MqttSettings
    log: LogSettings


SECTIONS: dict[str, type[BaseModel]] = {
    "server": ServerSettings,
    "model": ModelSettings,
    "engine": EngineSettings,
    "scheduler": SchedulerSettings,
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


def journal_folder(settings: MqttSettings, env: Mapping[str, str]) -> Path | None:
    """Where requests over MQTT are kept; None where they are kept in memory.

    Args:
        settings: the configured folder, or none.
        env: the environment; systemd's ``STATE_DIRECTORY`` comes before ``XDG_STATE_HOME``.

    Raises:
        ConfigError: no folder is configured, and the user has no home.
    """
    if settings.journal is not None:
        return None if settings.journal == Path("none") else settings.journal.expanduser()
    return _state_folder(env) / settings.device / "journal"


def broker_folder(settings: MqttSettings, env: Mapping[str, str]) -> Path:
    """Where the embedded broker keeps its clients and messages; ``env`` as for :func:`journal_folder`.

    Raises:
        ConfigError: no folder is configured, and the user has no home.
    """
    if settings.broker_folder is not None:
        return settings.broker_folder.expanduser()
    return _state_folder(env) / settings.device / "broker"


def _state_folder(env: Mapping[str, str]) -> Path:
    if given := env.get("STATE_DIRECTORY", "").split(":")[0]:  # several are separated by colons
        return Path(given)
    if home := env.get("XDG_STATE_HOME"):
        return Path(home) / "qwedge"
    try:
        return Path.home() / ".local" / "state" / "qwedge"
    except RuntimeError:
        hint = "set mqtt.journal and mqtt.broker_folder to folders, or mqtt.journal to none"
        raise ConfigError("there is no folder for requests and messages: the user has no home", hint=hint) from None


def environment_name(section: str, field: str) -> str:
    """The variable that sets a field: ``server``, ``port`` -> ``QWEDGE_SERVER_PORT``."""
    return f"{ENV_PREFIX}{section}_{field}".upper()


def sanitize_device(name: str) -> str:
    """A host name as one MQTT topic level: letters, digits, ``.``, ``_``, ``-``; ``device`` if nothing remains."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")[:64] or "device"


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
        return tomllib.loads(path.read_text(encoding="utf-8"))
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
    reason = str(first["msg"]).removeprefix("Value error, ").replace("Input should", "must").split(", unable")[0]
    if len(first["loc"]) == 1:
        return ConfigError(f"[{first['loc'][0]}] {reason}", hint="docs/configuration.md lists all settings")
    section, field, *inner = map(str, first["loc"])
    if (section, field) == ("mqtt", "rule") and inner:
        return _explain_rule(given["mqtt.rule"], first["type"], reason, inner)
    description = SECTIONS[section].model_fields[field].description
    return ConfigError(f"{given[f'{section}.{field}'].place} {reason}", hint=f"{section}.{field}: {description}")


def _explain_rule(given: _Given, kind: str, reason: str, path: Sequence[str]) -> ConfigError:
    """What is wrong with a rule; ``path`` is its number and then, where there is one, the key."""
    number, *keys = path
    fields = {info.alias or name: info for name, info in RuleSettings.model_fields.items()}
    place = f"{given.place.removesuffix(' [mqtt] rule')} [[mqtt.rule]] number {int(number) + 1}"
    if not keys:
        return ConfigError(f"{place} {reason}", hint="see docs/mqtt-rules.md")
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
