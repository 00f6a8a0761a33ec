"""Ed25519 signatures of manifests, the keys that make them, and the folder of keys that are trusted.

A manifest lists every file of its bundle with size and SHA-256, so a signature over the manifest's bytes covers the
bundle (RFC 8032 for Ed25519). A key is two files: ``NAME.key``, PKCS #8 in PEM, readable by its owner alone; and
``NAME.pub``, a small JSON that goes to the devices.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.errors import ConfigError, SignatureError

PRIVATE_SUFFIX = ".key"
PUBLIC_SUFFIX = ".pub"
MAX_KEY_BYTES = 1 << 12
"""Bytes of a key file or a signature."""
MAX_TRUSTED_KEYS = 64
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_OTHERS = 0o077


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _PublicFile(_File):
    """``NAME.pub``."""

    name: Annotated[str, Field(pattern=_NAME)]
    key_id: str
    algorithm: Literal["ed25519"]
    public_key: str
    """The 32 bytes, base64."""


class Signature(_File):
    """``manifest.sig``."""

    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """Which key made it, as it says itself."""
    algorithm: Literal["ed25519"]
    signature: str
    """The 64 bytes over ``manifest.json``, base64."""


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked with."""

    name: str
    """Who signs, in the words of who made the key."""
    raw: bytes
    """The 32 bytes of RFC 8032."""

    @property
    def key_id(self) -> str:
        """16 hexadecimal digits that name the key."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """Read ``NAME.pub``.

        Raises:
            ConfigError: it cannot be read, or is no public key.
        """
        hint = "a public key is the .pub file that `qwedge keys init` makes"
        try:
            file = _PublicFile.model_validate_json(_read_small(path))
            key = cls(file.name, _unbase64(file.public_key, 32))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no public key: {_reason(error)}", hint=hint) from None
        if key.key_id != file.key_id:
            raise ConfigError(f"{path} is no public key: its key_id is another key's", hint=hint)
        return key

    def save(self, path: Path) -> None:
        """Write ``NAME.pub``.

        Raises:
            OSError: there is such a file, or the disk refused.
        """
        file = _PublicFile(name=self.name, key_id=self.key_id, algorithm="ed25519", public_key=_base64(self.raw))
        _write_new(path, file.model_dump_json(indent=2).encode() + b"\n", 0o644)


class PrivateKey:
    """A key that signs; made by :meth:`load`."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @property
    def key_id(self) -> str:
        """The public key's name."""
        return PublicKey("", self._key.public_key().public_bytes_raw()).key_id

    @classmethod
    def load(cls, path: Path) -> PrivateKey:
        """Read ``NAME.key``.

        Raises:
            ConfigError: it cannot be read, others may read it, or it is no Ed25519 key.
        """
        key = load_private_pem(path, hint="a private key is the .key file that `qwedge keys init` makes")
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path} is no Ed25519 key", hint="qwedge keys init makes one")
        return cls(key)

    def sign(self, message: bytes) -> bytes:
        """What ``manifest.sig`` holds for a manifest of these bytes; the same for the same bytes, always."""
        made = Signature(key_id=self.key_id, algorithm="ed25519", signature=_base64(self._key.sign(message)))
        return made.model_dump_json(indent=2).encode() + b"\n"


@dataclass(frozen=True)
class Trust:
    """A folder of public keys; it is read anew for each check, so that a key that is taken out counts no more."""

    folder: Path

    def read_keys(self) -> tuple[PublicKey, ...]:
        """The keys, by file name.

        Raises:
            ConfigError: there is no folder, no key or too many in it, or one of them cannot be read.
        """
        try:
            paths = sorted(path for path in self.folder.iterdir() if path.suffix == PUBLIC_SUFFIX)
        except OSError as error:
            hint = "model.trust names a folder of public keys"
            raise ConfigError(f"{self.folder} cannot be read: {error.strerror}", hint=hint) from None
        if not 0 < len(paths) <= MAX_TRUSTED_KEYS:
            hint = f"put 1 to {MAX_TRUSTED_KEYS} of the .pub files that `qwedge keys init` makes into it"
            raise ConfigError(f"{self.folder} holds {len(paths) or 'no'} public keys", hint=hint)
        return tuple(PublicKey.load(path) for path in paths)

    def check(self, message: bytes, signature: bytes | None, what: str) -> PublicKey:
        """Find the trusted key that signed these bytes.

        Args:
            message: the bytes of ``manifest.json``.
            signature: the bytes of ``manifest.sig``; None where there is none.
            what: the bundle, as error messages name it.

        Raises:
            SignatureError: there is no signature, it is malformed, of a key that is not trusted, or does not fit.
            ConfigError: as :meth:`read_keys`.
        """
        keys = {key.key_id: key for key in self.read_keys()}
        if signature is None:
            hint = f"sign it with `qwedge sign`; the keys in {self.folder} are trusted"
            raise SignatureError(f"{what} is not signed", hint=hint)
        made = parse_signature(signature, what)
        key = keys.get(made.key_id)
        if key is None:
            hint = f"put its public key into {self.folder} if you trust whoever has it"
            raise SignatureError(f"{what} is signed with the key {made.key_id}, which is not trusted", hint=hint)
        try:
            Ed25519PublicKey.from_public_bytes(key.raw).verify(_unbase64(made.signature, 64), message)
        except (InvalidSignature, ValueError):
            hint = "manifest or signature were changed: take the bundle from its source again"
            raise SignatureError(f"the signature of {what} does not fit its manifest", hint=hint) from None
        return key


def load_private_pem(path: Path, *, hint: str) -> PrivateKeyTypes:
    """Read a private key in PEM that has no passphrase and that nobody but its owner may read.

    Raises:
        ConfigError: it cannot be read, others may read it, or it is no such key.
    """
    try:
        return load_pem_private_key(_read_small(path, refuse=_readable_by_others), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no private key: {_reason(error)}", hint=hint) from None


def parse_signature(raw: bytes, what: str) -> Signature:
    """What a ``manifest.sig`` says; not whether it is true.

    Raises:
        SignatureError: it is malformed.
    """
    try:
        return Signature.model_validate_json(raw)
    except ValidationError:
        hint = "sign it again with `qwedge sign`"
        raise SignatureError(f"the signature of {what} is malformed", hint=hint) from None


def make_keys(folder: Path, name: str) -> PublicKey:
    """Make a key pair, ``NAME.key`` (0600) and ``NAME.pub``; existing files stay.

    Raises:
        ConfigError: the name cannot be used, there is a key of that name, or the folder cannot be written.
    """
    if re.fullmatch(_NAME, name) is None:
        raise ConfigError(f"{name!r} cannot be the name of a key", hint="use up to 64 letters, digits, dots and dashes")
    files = folder / (name + PRIVATE_SUFFIX), folder / (name + PUBLIC_SUFFIX)
    if any(path.exists() for path in files):
        hint = "choose another name; a key is never overwritten"
        raise ConfigError(f"{folder} holds a key {name} already", hint=hint)
    private = Ed25519PrivateKey.generate()
    public = PublicKey(name, private.public_key().public_bytes_raw())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_new(files[0], private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
        public.save(files[1])
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}", hint="choose another --folder") from None
    return public


def _write_new(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _read_small(path: Path, *, refuse: Callable[[os.stat_result], str | None] = lambda _: None) -> bytes:
    """The bytes of a regular file of at most :data:`MAX_KEY_BYTES`.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is too large, no regular file, or what ``refuse`` says.
    """
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a regular file")
        if (reason := refuse(info)) is not None:
            raise ValueError(reason)
        data = file.read(MAX_KEY_BYTES + 1)
    if len(data) > MAX_KEY_BYTES:
        raise ValueError(f"larger than {MAX_KEY_BYTES} bytes")
    return data


def _readable_by_others(info: os.stat_result) -> str | None:
    return "others may read it (chmod 600)" if info.st_mode & _OTHERS else None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unbase64(text: str, length: int) -> bytes:
    """Raises ValueError where it is not base64 of so many bytes."""
    data = base64.b64decode(text, validate=True)
    if len(data) != length:
        raise ValueError(f"{len(data)} bytes instead of {length}")
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}"
    return " ".join(str(error).split())[:120]
