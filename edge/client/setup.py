"""From what a program says to a transport and to questions."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from edge.client.http import HttpTransport
from edge.client.mqtt import MqttTransport
from edge.client.wire import Question, Transport
from edge.errors import ConfigError, RequestError
from edge.mqtt.packets import Identity
from edge.mqtt.topics import is_segment
from edge.settings.mqtt import BrokerAddress

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True)
class Target:
    """Whom to ask, and as whom.

    Raises:
        ConfigError: by :meth:`transport`.
    """

    url: str
    """``mqtt://HOST[:PORT]``, ``mqtts://...``, ``http://HOST[:PORT]`` or ``https://...``."""
    client: str | None = None
    """Our name in topics, and the MQTT client id; nobody else at the broker may use it. None = the user name in topics,
    as access control by users wants it, or else a new one; and a new client id."""
    device: str | None = None
    """MQTT: who is asked."""
    pool: str | None = None
    """MQTT: the model that is asked, on any device that serves it."""
    root: str = "qwedge"
    """MQTT: first level(s) of every topic."""
    username: str | None = None
    password: str | None = None
    """MQTT: the broker's user, where it wants one."""
    tls: ssl.SSLContext | None = None
    """For ``mqtts`` and ``https``: whom to trust, and what certificate to show; None = the system's CAs and none."""
    key: str | None = None
    """HTTP: the API key, where the server wants one."""
    connect_timeout_s: float = 10.0
    """How long the first connection may take."""

    def transport(self) -> Transport:
        """The way there; nothing is connected yet.

        Raises:
            ConfigError: the address is none, or device and pool do not fit it.
        """
        url = _split(self.url)
        if url.scheme in {"http", "https"}:
            if self.device or self.pool:
                raise ConfigError("an HTTP server is one device", hint="name a device or a pool with mqtt:// only")
            return HttpTransport(url, tls=self.tls, key=self.key, connect_timeout_s=self.connect_timeout_s)
        if (self.device is None) == (self.pool is None):
            raise ConfigError("who is to be asked?", hint="name either a device or the model of a pool")
        tls = url.scheme == "mqtts"
        new = f"asker-{uuid.uuid4().hex[:12]}"
        return MqttTransport(
            BrokerAddress(url.hostname or "", url.port or DEFAULT_PORTS[url.scheme], tls=tls),
            Identity(self.client or new, self.username, self.password, self.tls),
            client=self.client or self.username or new,
            root=self.root,
            device=self.device,
            pool=self.pool,
            connect_timeout_s=self.connect_timeout_s,
        )


def chat_body(prompt: str, system: str | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chat request of one user message."""
    opening = [{"role": "system", "content": system}] if system else []
    return {"messages": [*opening, {"role": "user", "content": prompt}], **fields}


def make_question(body: Mapping[str, Any], request_id: str | None, *, stream: bool) -> Question:
    """A question, under an id of its own where none is given.

    Raises:
        RequestError: the id is not allowed, or a stream of several answers is asked for.
    """
    request_id = request_id or uuid.uuid4().hex
    if not is_segment(request_id):
        hint = "use 1 to 64 letters, digits, '.', '_' and '-'"
        raise RequestError("the request's id is not allowed", hint=hint, param="id")
    if stream and (body.get("n") or 1) != 1:
        raise RequestError("a stream gives the text of one answer", hint="ask without a stream for several", param="n")
    return Question(request_id, dict(body), stream)


def _split(url: str) -> SplitResult:
    hint = "mqtt://HOST:PORT or http://HOST:PORT"
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError as error:
        raise ConfigError(f"the address {url!r} is not allowed: {error}", hint=hint) from None
    if parts.scheme not in {"mqtt", "mqtts", "http", "https"} or not parts.hostname or not has_port:
        raise ConfigError(f"the address {url!r} is not allowed", hint=hint)
    if parts.username is not None:
        raise ConfigError("an address must not hold credentials", hint="give username and password by themselves")
    return parts
