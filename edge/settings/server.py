"""``[server]``: the HTTP server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edge.settings.section import NAME, SECRET, Port, Section
from edge.settings.upstream import MAX_UPSTREAMS, UpstreamSettings

_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")


class ServerSettings(Section):
    """The HTTP server."""

    host: Annotated[str, NAME] = Field(
        "127.0.0.1",
        min_length=1,
        max_length=255,
        description="Address to listen on; one beyond loopback needs keys, `tls_client_ca` or `open`.",
    )
    port: Port = Field(8080, description="TCP port to listen on; 0 picks a free one.")
    max_body_bytes: int = Field(
        1 << 20, ge=1 << 10, le=1 << 26, description="Largest request body in bytes; a larger one is answered with 413."
    )
    allowed_hosts: Annotated[tuple[str, ...], NAME] = Field(
        ("localhost",),
        min_length=1,
        max_length=64,
        description="Names that requests may use as Host (without port), against DNS rebinding; plain IP addresses and"
        " the name in `host` are always allowed. Name a device on a network here: `edge-7.local`.",
    )
    cors_origins: Annotated[tuple[str, ...], NAME] = Field(
        (),
        max_length=64,
        description="Web sites whose pages may use this server from a browser: `https://hmi.plant.example`. Without"
        " it, none but the own page.",
    )
    keys_file: Annotated[Path | None, SECRET] = Field(
        None,
        description="File of the keys that clients need (`qwedge http add-key`). Without it, `http/keys.json` in"
        " `$STATE_DIRECTORY`, `$XDG_STATE_HOME/qwedge` or `~/.local/state/qwedge`.",
    )
    open: Literal["on", "off"] = Field(
        "off",
        description="`on` answers without a key whoever reaches the port, beyond loopback too; `manage` needs a key.",
    )
    tls_cert: Path | None = Field(
        None,
        description="PEM file of this device's certificate, which makes the server speak HTTPS; a renewed one is taken"
        " up while serving. Relative names of the `tls_` files are systemd's credentials if it gives any.",
    )
    tls_key: Annotated[Path | None, SECRET] = Field(
        None, description="PEM file of the certificate's key, without a passphrase."
    )
    tls_client_ca: Path | None = Field(
        None, description="PEM file of the CAs that vouch for clients, who then all need a certificate."
    )
    hsts_s: int = Field(
        86_400,
        ge=0,
        le=63_072_000,
        description="With TLS, seconds for which browsers use nothing but HTTPS for this host, whichever port; 0 does"
        " not ask for it.",
    )
    mdns: Literal["on", "off"] = Field(
        "off",
        description="`on` announces the server on the local network as `_qwedge._tcp`, so that programs find it without"
        " an address; on loopback there is nothing to announce.",
    )
    upstream: tuple[UpstreamSettings, ...] = Field(
        (),
        max_length=MAX_UPSTREAMS,
        description="Other OpenAI-compatible servers, for named models that this device lacks, one table"
        " `[[server.upstream]]` for each.",
    )
    drain_s: float = Field(
        10.0,
        ge=0,
        le=600,
        allow_inf_nan=False,
        description="Seconds that running requests get to finish when the server stops.",
    )

    @field_validator("allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _plain_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(_ORIGIN.fullmatch(origin) for origin in value):
            raise ValueError(
                "must be origins: http:// or https://, a name in lower case, and the port if it is unusual"
            )
        return value

    @field_validator("upstream")
    @classmethod
    def _own_models(cls, value: tuple[UpstreamSettings, ...]) -> tuple[UpstreamSettings, ...]:
        models = [model for upstream in value for model in upstream.models]
        if len(set(models)) < len(models) or len({upstream.name for upstream in value}) < len(value):
            raise ValueError("must have a name of its own for each upstream, and each model once")
        return value

    @field_validator("open", "mdns", mode="before")
    @classmethod
    def _on_off(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _whole_tls(self) -> ServerSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("must have both tls_cert and tls_key, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("must have tls_cert and tls_key where it has tls_client_ca")
        return self
