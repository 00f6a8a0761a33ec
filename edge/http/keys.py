"""The keys that clients bring: named, with what each may do, hashed in one file.

A key is 256 random bits, so its plain SHA-256 says nothing about it: there is nothing to guess, and neither salt nor a
slow hash, which passwords need, would add to that. It would cost every request what it costs an attacker.

The file is replaced as a whole; a running server takes a change with the next request.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.errors import ConfigError, RateLimitError
from edge.http.private_file import locked, read_private, write_file, writing
from edge.http.rights import Caller, Right

log = logging.getLogger(__name__)

MAX_KEYS: Final = 256
MAX_MODELS: Final = 64
"""Models that one key names."""
MAX_NAME_CHARS: Final = 256
"""Of such a model's name."""
PREFIX: Final = "qwedge-"
"""What keys begin with, so that a scanner finds one that was published by mistake."""
NAME_PATTERN: Final = r"^[A-Za-z0-9._-]{1,64}$"
_KEY_BYTES: Final = 32
_MINUTE_S: Final = 60.0

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Key(BaseModel):
    """One key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    scopes: Annotated[frozenset[Right], Field(min_length=1)]
    models: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)], ...], Field(max_length=MAX_MODELS)
    ] = ()
    """Empty: any."""
    rate_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests for generation; None: any number."""

    @property
    def caller(self) -> Caller:
        """Who brings it."""
        return Caller(self.name, self.scopes, self.models)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    v: Annotated[int, Field(ge=1, le=1)] = 1
    keys: Annotated[tuple[Key, ...], Field(max_length=MAX_KEYS)]


def new_key() -> str:
    """A key that nobody has."""
    return PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def hash_key(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def load_keys(path: Path) -> tuple[Key, ...] | None:
    """The keys in alphabetical order; None where there never was one.

    Raises:
        ConfigError: the file is open to others, damaged or unreadable.
    """
    try:
        return _File.model_validate_json(read_private(path)).keys
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        hint = "use the user that qwedge runs as, and check server.keys_file"
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    except ValidationError:
        hint = "put it back from a backup, or remove it and add the keys again"
        raise ConfigError(f"{path} is damaged", hint=hint) from None


def add_key(path: Path, key: Key) -> bool:
    """Add a key, or replace the one of its name; returns whether there was one.

    Raises:
        ConfigError: as :func:`load_keys`, or there are too many, or the file cannot be written.
    """

    def change(keys: dict[str, Key]) -> bool:
        known = key.name in keys
        if not known and len(keys) >= MAX_KEYS:
            raise ConfigError(f"there are {MAX_KEYS} keys already", hint="qwedge http remove-key NAME")
        keys[key.name] = key
        return known

    return _change(path, change)


def remove_key(path: Path, name: str) -> None:
    """Remove a key.

    Raises:
        ConfigError: there is none of that name, or as :func:`add_key`.
    """

    def change(keys: dict[str, Key]) -> bool:
        if name not in keys:
            raise ConfigError(f"there is no key {name!r}", hint=f"the keys are {', '.join(keys) or 'none'}")
        del keys[name]
        return True

    _change(path, change)


def _change(path: Path, change: Callable[[dict[str, Key]], bool]) -> bool:
    with writing(path), locked(path):
        keys = {key.name: key for key in load_keys(path) or ()}
        result = change(keys)
        text = _File(keys=tuple(keys[name] for name in sorted(keys))).model_dump_json(indent=1)
        write_file(path, text.encode())
    return result


class KeyRing:
    """The keys as a running server knows them.

    Once there was a key nobody comes in without one, even when the last one is removed. A file that becomes unreadable
    while serving changes nothing but the log.

    Args:
        path: the file; it need not be there.
        clock: monotonic seconds.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._version: tuple[int, ...] | None = None
        self._keys: Mapping[str, Key] | None = None
        self._buckets: dict[str, _Bucket] = {}

    def load(self) -> None:
        """Read the file.

        Raises:
            ConfigError: as :func:`load_keys`.
        """
        self._version = self._look()
        self._take(load_keys(self._path))

    @property
    def asked_for(self) -> bool:
        """Whether there are keys, or were."""
        self._refresh()
        return self._keys is not None

    def find(self, key: str) -> Key | None:
        """What a client brings, if it is one of the keys. Takes as long whichever it is, and if it is none."""
        self._refresh()
        digest = hash_key(key)
        matching = [known for known in (self._keys or {}).values() if hmac.compare_digest(known.sha256, digest)]
        return matching[0] if matching else None

    def named(self, name: str) -> Key | None:
        """The key of a name."""
        self._refresh()
        return (self._keys or {}).get(name)

    def spend(self, name: str) -> None:
        """Count a request against the key's rate.

        Raises:
            RateLimitError: it came too soon.
        """
        if (bucket := self._buckets.get(name)) is not None and (wait_s := bucket.take(self._clock())) > 0:
            hint = f"the key {name!r} is good for {bucket.per_minute}/min"
            raise RateLimitError("too many requests with this key", hint=hint, retry_after_s=wait_s)

    def _look(self) -> tuple[int, ...] | None:
        try:
            info = self._path.stat()
        except OSError:
            return None
        return info.st_ino, info.st_mtime_ns, info.st_ctime_ns, info.st_size

    def _refresh(self) -> None:
        if (version := self._look()) == self._version:
            return
        self._version = version
        try:
            self._take(load_keys(self._path))
        except ConfigError as error:
            log.warning("the keys stay as they were: %s (hint: %s)", error.message, error.hint)

    def _take(self, keys: tuple[Key, ...] | None) -> None:
        if keys is None:
            keys = None if self._keys is None else ()
        self._keys = None if keys is None else {key.name: key for key in keys}
        rates = {key.name: key.rate_per_minute for key in keys or () if key.rate_per_minute is not None}
        kept = {name: bucket for name, bucket in self._buckets.items() if rates.get(name) == bucket.per_minute}
        new = {name: _Bucket(rate, float(rate), self._clock()) for name, rate in rates.items()}
        self._buckets = new | kept


@dataclass
class _Bucket:
    """Tokens that come back evenly; a minute's worth may be spent at once."""

    per_minute: int
    num_tokens: float
    at: float

    def take(self, now: float) -> float:
        """Spend a token; returns 0, or the seconds until there is one."""
        since, self.at = now - self.at, now
        self.num_tokens = min(float(self.per_minute), self.num_tokens + since * self.per_minute / _MINUTE_S)
        if self.num_tokens >= 1:
            self.num_tokens -= 1
            return 0.0
        return (1 - self.num_tokens) * _MINUTE_S / self.per_minute
