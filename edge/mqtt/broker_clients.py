"""The clients that the embedded broker knows: their names, hashed passwords and topics, in a private folder.

The file is replaced as a whole and survives a power cut. From the first client on, the broker lets nobody in without a
password; that stays so when the last one is removed.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from edge.engine.private_folder import NotPlainError, PrivateFolder
from edge.errors import ConfigError, UnavailableError
from edge.mqtt.topics import is_segment

FILE: Final = "clients.json"
MAX_CLIENTS: Final = 1000
MAX_TOPICS: Final = 64
"""Further topics of one client, for each direction."""
MAX_FILE_BYTES: Final = 16 << 20
ITERATIONS: Final = 20_000
"""Rounds of PBKDF2; mosquitto computes them anew, on its only thread, whenever somebody connects: about 10 ms."""
_SALT_BYTES: Final = 12
_LOCK_S: Final = 2.0
"""How long to wait for another process that reads or changes the file."""
_LOCK_POLL_S: Final = 0.02


def check_filter(text: str) -> str:
    """A topic filter as it can stand in an access control list.

    Raises:
        ValueError: it cannot.
    """
    levels = text.split("/")
    plain = text.isprintable() and text == text.strip() and not text.startswith("$")
    wildcards = all(level in {"+", "#"} or not {"+", "#"} & set(level) for level in levels) and "#" not in levels[:-1]
    if not (0 < len(text) <= 256 and plain and wildcards):
        raise ValueError(f"{text!r} is no topic filter: '+' and '#' are levels of their own, '#' the last one, no '$'")
    return text


def check_name(text: str) -> str:
    """A client's name.

    Raises:
        ValueError: it cannot stand in a topic.
    """
    if not is_segment(text):
        raise ValueError(f"{text!r} is no name of a client: 1 to 64 letters, digits, '.', '_' and '-'")
    return text


Filters = Annotated[tuple[Annotated[str, AfterValidator(check_filter)], ...], Field(max_length=MAX_TOPICS)]


class BrokerClient(BaseModel):
    """One client; its own requests and answers need no mention."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(check_name)]
    """User name and MQTT client id."""
    password: Annotated[str, Field(pattern=r"^\$7\$[0-9]{1,7}\$[A-Za-z0-9+/=]{4,128}\$[A-Za-z0-9+/=]{88}$", repr=False)]
    """Hashed, as :func:`hash_password` does."""
    publish: Filters = ()
    """Further topics on which it may publish."""
    subscribe: Filters = ()
    """Further topics that it may read."""
    manage: bool = False
    """Whether it may give devices commands."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    v: Annotated[int, Field(ge=1, le=1)] = 1
    clients: Annotated[tuple[BrokerClient, ...], Field(max_length=MAX_CLIENTS)]


def hash_password(password: str, salt: bytes | None = None, iterations: int = ITERATIONS) -> str:
    """A password as mosquitto's password files hold it: PBKDF2 with SHA-512, its kind 7 [1].

    [1] https://mosquitto.org/man/mosquitto_passwd-1.html
    """
    salt = salt or os.urandom(_SALT_BYTES)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode("utf-8"), salt, iterations)
    return f"$7${iterations}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def load_clients(folder: Path) -> tuple[BrokerClient, ...] | None:
    """The clients in alphabetical order; None where there never was one.

    Raises:
        ConfigError: the folder or the file is open to others, damaged or unreadable.
        UnavailableError: another process keeps it busy.
    """
    if not folder.exists():
        return None
    with _opened(folder) as opened:
        return _read(opened)


def add_client(folder: Path, client: BrokerClient) -> bool:
    """Add a client, or replace the one of its name; returns whether there was one.

    Raises:
        ConfigError: as :func:`load_clients`, or there are too many.
        UnavailableError: another process keeps the folder busy.
    """
    with _opened(folder) as opened:
        known = _read(opened) or ()
        others = [other for other in known if other.name != client.name]
        if len(others) >= MAX_CLIENTS:
            raise ConfigError(f"there are {MAX_CLIENTS} clients already", hint="qwedge mqtt remove-client NAME")
        _write(opened, [*others, client])
    return len(others) < len(known)


def remove_client(folder: Path, name: str) -> None:
    """Remove a client.

    Raises:
        ConfigError: there is none of that name, or as :func:`load_clients`.
        UnavailableError: another process keeps the folder busy.
    """
    known = load_clients(folder) or ()
    if name not in {client.name for client in known}:
        names = ", ".join(client.name for client in known) or "none"
        raise ConfigError(f"there is no client {name!r}", hint=f"the clients are {names}")
    with _opened(folder) as opened:
        _write(opened, [client for client in _read(opened) or () if client.name != name])


def _read(folder: PrivateFolder) -> tuple[BrokerClient, ...] | None:
    path = folder.path / FILE
    try:
        with folder.read(FILE) as file:
            return _File.model_validate_json(file.read(MAX_FILE_BYTES)).clients
    except FileNotFoundError:
        return None
    except NotPlainError:
        raise ConfigError(f"{path} is a link or open to other users", hint=f"chmod 600 {path}") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", hint="check the disk and mqtt.broker_folder"
        ) from None
    except ValidationError:
        hint = "put it back from a backup, or remove it and add the clients again"
        raise ConfigError(f"{path} is damaged", hint=hint) from None


def _write(folder: PrivateFolder, clients: list[BrokerClient]) -> None:
    text = _File(clients=tuple(sorted(clients, key=lambda client: client.name))).model_dump_json(indent=1)
    try:
        folder.write(FILE, _writer(text.encode()))
    except OSError as error:
        hint = "nothing was changed; check the disk and mqtt.broker_folder"
        raise ConfigError(f"{folder.path / FILE} cannot be written: {error.strerror}", hint=hint) from None


def _writer(data: bytes) -> Callable[[BinaryIO], None]:
    def fill(file: BinaryIO) -> None:
        file.write(data)

    return fill


@contextmanager
def _opened(path: Path) -> Iterator[PrivateFolder]:
    """The folder, for this process alone; others are waited for."""
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            folder = PrivateFolder.open(path)
            break
        except UnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOCK_POLL_S)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"{path} cannot be used: {reason}", hint="set mqtt.broker_folder") from None
    try:
        yield folder
    finally:
        folder.close()
