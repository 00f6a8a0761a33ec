"""``[mqtt]``: the broker, the journal, the pool and the rules."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edge.settings.rules import MAX_RULES, RuleSettings
from edge.settings.section import NAME, SECRET, Port, Section

DISCOVERY_PREFIX = "homeassistant"
"""Where Home Assistant looks for devices, unless it is told otherwise."""
DISCOVERY_OFF = "off"
"""Value of ``mqtt.home_assistant`` that takes the announcement back."""
_TOPIC = re.compile(r"[^\s+#$/\0]+(/[^\s+#$/\0]+)*")
_BROKER = re.compile(r"(?P<scheme>mqtts?)://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>\d{1,5}))?/?")


@dataclass(frozen=True)
class BrokerAddress:
    """Where an MQTT broker listens."""

    host: str
    port: int
    tls: bool = False


class MqttSettings(Section):
    """The MQTT side."""

    broker: Annotated[str, NAME] = Field(
        "none",
        description="`none`, `embedded` (a mosquitto of our own, on loopback) or a broker's address:"
        " `mqtt://HOST:PORT`, `mqtts://HOST:PORT`.",
    )
    port: Port = Field(1883, description="TCP port of the embedded broker on loopback; 0 picks a free one.")
    root: str = Field("qwedge", max_length=128, description="First level(s) of every topic.")
    device: Annotated[str, NAME] = Field(
        default_factory=lambda: sanitize_device(socket.gethostname()),
        max_length=64,
        description="This device's name in topics; without it, the host's name.",
    )
    client_id: Annotated[str, NAME] = Field(
        "qwedge", min_length=1, max_length=64, description="First part of the MQTT client ids; the device follows."
    )
    username: Annotated[str | None, NAME] = Field(
        None, min_length=1, max_length=256, description="User name for the broker."
    )
    password_file: Annotated[Path | None, SECRET] = Field(
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
    tls_key: Annotated[Path | None, SECRET] = Field(
        None, description="PEM file of the certificate's key, without a passphrase."
    )
    listen: Annotated[str, NAME] = Field(
        "127.0.0.1",
        min_length=1,
        max_length=255,
        description="Address on which the embedded broker listens with TLS, once there is a `tls_cert`; beyond loopback"
        " only if it knows its clients.",
    )
    tls_port: Port = Field(8883, description="TCP port of the embedded broker's TLS; 0 picks a free one.")
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
    management: Literal["on", "off"] = Field(
        "off",
        description="`on` takes management commands (switch, verify, rollback, reload, restart) from whoever may write"
        " to the device's `cmd` topics. The broker's access control decides who that is.",
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

    @field_validator("pool", "management", "broker_sync", mode="before")
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


def sanitize_device(name: str) -> str:
    """A host name as one MQTT topic level: letters, digits, ``.``, ``_``, ``-``; ``device`` if nothing remains."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")[:64] or "device"
