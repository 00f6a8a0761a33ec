"""Where state is kept when no setting names a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edge.errors import ConfigError
from edge.settings.engine import ModelSettings
from edge.settings.mqtt import MqttSettings
from edge.settings.secret_files import find_secret
from edge.settings.server import ServerSettings


def store_folder(settings: ModelSettings, env: Mapping[str, str]) -> Path:
    """Where bundles are installed; ``env`` as for :func:`journal_folder`.

    Raises:
        ConfigError: no folder is configured, and the user has no home.
    """
    if settings.store is not None:
        return settings.store.expanduser()
    return state_folder(env) / "models"


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
    return device_folder(settings, env) / "journal"


def device_folder(settings: MqttSettings, env: Mapping[str, str]) -> Path:
    """What outlives a process and is one device's alone; ``env`` as for :func:`journal_folder`.

    Raises:
        ConfigError: the user has no home.
    """
    return state_folder(env) / settings.device


def broker_folder(settings: MqttSettings, env: Mapping[str, str]) -> Path:
    """Where the embedded broker keeps its clients and messages; ``env`` as for :func:`journal_folder`.

    Raises:
        ConfigError: no folder is configured, and the user has no home.
    """
    if settings.broker_folder is not None:
        return settings.broker_folder.expanduser()
    return device_folder(settings, env) / "broker"


def keys_file(settings: ServerSettings, env: Mapping[str, str]) -> Path:
    """Where the keys of HTTP clients are; ``env`` as for :func:`journal_folder`.

    Raises:
        ConfigError: no file is configured, and the user has no home.
    """
    if settings.keys_file is not None:
        return find_secret(settings.keys_file.expanduser())
    return state_folder(env) / "http" / "keys.json"


def tls_folder(env: Mapping[str, str]) -> Path:
    """Where ``qwedge tls`` keeps its CA and certificates; ``env`` as for :func:`journal_folder`.

    Raises:
        ConfigError: the user has no home.
    """
    return state_folder(env) / "tls"


def evaluations_folder(env: Mapping[str, str]) -> Path:
    """Where reports of evaluations are kept; ``env`` as for :func:`journal_folder`.

    Raises:
        ConfigError: the user has no home.
    """
    return state_folder(env) / "evaluations"


def state_folder(env: Mapping[str, str]) -> Path:
    """The folder of everything that outlives a process: systemd's, or the user's.

    Raises:
        ConfigError: the user has no home.
    """
    if given := env.get("STATE_DIRECTORY", "").split(":")[0]:  # several are separated by colons
        return Path(given)
    if home := env.get("XDG_STATE_HOME"):
        return Path(home) / "qwedge"
    try:
        return Path.home() / ".local" / "state" / "qwedge"
    except RuntimeError:
        hint = "set model.store, mqtt.journal and mqtt.broker_folder to folders, or mqtt.journal to none"
        raise ConfigError("there is no folder for models and messages: the user has no home", hint=hint) from None
