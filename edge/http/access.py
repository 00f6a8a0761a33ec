"""Who may do what: keys and client certificates, and what each path needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers
from starlette.types import Scope

from edge.errors import UnauthorizedError
from edge.http.keys import NAME_PATTERN, KeyRing
from edge.http.rights import RIGHTS, Caller, Right
from edge.settings.server import ServerSettings

_READING: Final = frozenset({"GET", "HEAD"})
_FREE: Final = re.compile(r"/|/favicon\.ico|/static/.*|/health(/live|/ready)?")
"""What is read without a key: the page, which asks for one, and the health that supervisors look at."""
_ANY_RIGHT: Final = re.compile(r"/openapi\.json|/v1/(models(/.+)?|queue(/.+)?)|/api/(tags|version)")
"""What is read with any key: clients of every kind look there before they ask."""
_QUEUED: Final = re.compile(
    r"/v1/(chat/completions|completions|responses|embeddings|messages)|/api/(chat|generate|embed|embeddings)"
)
"""What is posted to the model, and waits for it."""
_AT_ONCE: Final = re.compile(r"/v1/messages/count_tokens|(/v1)?/(tokenize|detokenize|apply-template)|/api/show")
"""What is posted to its tokenizer, template and description."""
OPEN_RIGHTS: Final[frozenset[Right]] = frozenset({"generate", "read"})
"""Of whoever reaches an open server, and of certificates that no key says more about."""


class Access:
    """Tells who sends a request, and refuses what he may not do.

    Args:
        keys: loaded.
        local: nobody but this device's own programs reaches the server.
        settings: whether it is open to all.
    """

    def __init__(self, keys: KeyRing, settings: ServerSettings, *, local: bool) -> None:
        self._keys = keys
        self._open = settings.open == "on"
        self._nobody = Caller(rights=frozenset(RIGHTS) if local and not self._open else OPEN_RIGHTS)

    def admit(self, scope: Scope, headers: Headers) -> Caller:
        """Who sends the request.

        Raises:
            UnauthorizedError: it needs a key, and brings none that is known.
            ForbiddenError: the key does not allow this.
            RateLimitError: the key has sent too many requests.
        """
        method, path = scope["method"], scope["path"]
        if is_free(method, path):
            return Caller()
        caller = self._identify(headers, scope["state"].get("certificate"))
        if (right := needed_right(method, path)) is not None:
            caller.check_right(right)
        if right == "generate":
            self._keys.spend(caller.name)
        return caller

    def _identify(self, headers: Headers, certificate: str | None) -> Caller:
        """The key before the certificate before nobody."""
        asked_for = self._keys.asked_for
        if asked_for and (given := _given_key(headers)) and (key := self._keys.find(given)):
            return key.caller
        if certificate is not None:
            if not re.fullmatch(NAME_PATTERN, certificate):
                hint = "its common name must be 1 to 64 letters, digits, '.', '_' and '-'"
                raise UnauthorizedError("the client's certificate has no name that can be used", hint=hint)
            known = self._keys.named(certificate)
            return known.caller if known is not None else Caller(certificate, OPEN_RIGHTS)
        if asked_for and not self._open:
            hint = "send it as Authorization: Bearer KEY; qwedge http add-key NAME makes one"
            raise UnauthorizedError("a key is needed that this server knows", hint=hint)
        return self._nobody


def is_free(method: str, path: str) -> bool:
    """Whether everybody may have it."""
    return method in _READING and _FREE.fullmatch(path) is not None


def needed_right(method: str, path: str) -> Right | None:
    """What a request needs; None: any key will do. What is not known here takes the right to manage, or to read."""
    if method in _READING:
        return None if _ANY_RIGHT.fullmatch(path) else "read"
    asks = method == "POST" and (_QUEUED.fullmatch(path) or _AT_ONCE.fullmatch(path))
    return "generate" if asks else "manage"


def is_queued(method: str, path: str) -> bool:
    """Whether a request takes a place in the queue."""
    return method == "POST" and _QUEUED.fullmatch(path) is not None


def certificate_name(certificate: Mapping[str, object]) -> str:
    """Whom a client's certificate names: its common name, else its first DNS name or e-mail address.

    Args:
        certificate: as :meth:`ssl.SSLSocket.getpeercert` gives it.
    """
    subject = certificate.get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]  # type: ignore[attr-defined]
    others = certificate.get("subjectAltName", ())
    names += [value for kind, value in others if kind in {"DNS", "email"}]  # type: ignore[attr-defined]
    return str(names[0]) if names else ""


def _given_key(headers: Headers) -> str:
    """``Authorization: Bearer`` as OpenAI's clients send it, ``x-api-key`` as Anthropic's do."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
