"""``[server]``: the HTTP server."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from edge.settings.section import Port, Section


class ServerSettings(Section):
    """The HTTP server."""

    host: str = Field("127.0.0.1", min_length=1, max_length=255, description="Address to listen on.")
    port: Port = Field(8080, description="TCP port to listen on; 0 picks a free one.")
    max_body_bytes: int = Field(
        1 << 20, ge=1 << 10, le=1 << 26, description="Largest request body in bytes; a larger one is answered with 413."
    )
    allowed_hosts: tuple[str, ...] = Field(
        ("localhost",),
        min_length=1,
        max_length=64,
        description="Names that requests may use as Host (without port), against DNS rebinding; plain IP addresses and"
        " the name in `host` are always allowed. Name a device on a network here: `edge-7.local`.",
    )
    drain_s: float = Field(
        10.0,
        ge=0,
        le=600,
        allow_inf_nan=False,
        description="Seconds that running requests get to finish when the server stops.",
    )

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value
