"""What goes over a connection: who we are to the broker, messages that we publish, and messages that arrive."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Identity:
    """Who we are to the broker."""

    client_id: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    """Whom to trust and what certificate to show; without it, the system's CAs and none."""


@dataclass(frozen=True)
class Outgoing:
    """A message to publish."""

    topic: str
    payload: bytes
    qos: int
    retain: bool = False
    content_type: str = "application/json"
    """MQTT 5 only."""
    correlation: bytes | None = None
    """MQTT 5 only: echoed from the request."""
    expiry_s: int | None = None
    """MQTT 5 only: how long the broker may keep the message for somebody who is away."""


def no_ack() -> None:
    """What an acknowledgement does where none is due."""


@dataclass(frozen=True)
class Incoming:
    """A message that arrived."""

    topic: str
    payload: bytes | None
    """None where it was larger than ``max_payload``."""
    retain: bool
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    """What is left of the message's life in seconds."""
    redelivered: bool = False
    """The broker has sent it before and was not told that it arrived."""
    received_at: float = field(default_factory=time.monotonic)
    ack: Callable[[], None] = field(default=no_ack, compare=False, repr=False)
    """Tell the broker that the message need not be sent again; from any thread, once. PUBACKs go out in the order of
    the messages, so one that is never called holds back those behind it."""
