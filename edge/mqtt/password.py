"""Passwords, which stand in files only."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from edge.errors import ConfigError
from edge.settings.secret_files import find_secret

MAX_PASSWORD_BYTES: Final = 1024


def read_password(path: Path) -> str:
    """The first line of a password file.

    Raises:
        ConfigError: it cannot be read, is empty, or is no password file.
    """
    hint = "mqtt.password_file names a file whose first line is the password"
    path = find_secret(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            password = file.readline(MAX_PASSWORD_BYTES).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"the password file {path} cannot be read: {reason}", hint=hint) from None
    if not password:
        raise ConfigError(f"the password file {path} is empty", hint=hint)
    return password
