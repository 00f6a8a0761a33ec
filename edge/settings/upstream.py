"""``[[server.upstream]]``: another server that answers for models which this device lacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from edge.settings.section import NAME, SECRET

MAX_UPSTREAMS = 16
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>\d{1,5}))?(?P<path>/[\w./~-]*)?"
)


class UpstreamSettings(BaseModel):
    """One server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, NAME] = Field(
        min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$", description="What answers are marked with."
    )
    url: Annotated[str, NAME] = Field(max_length=512, description="Its OpenAI API: `https://gateway.plant.example/v1`.")
    models: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        min_length=1, max_length=64, description="The models that it answers for; requests for no others go there."
    )
    key_file: Annotated[Path | None, SECRET] = Field(
        None, description="File whose first line is the key that it wants."
    )
    tls_ca: Path | None = Field(None, description="PEM file of the CAs that vouch for it; without it, the system's.")
    timeout_s: float = Field(
        120.0, gt=0, le=3600, allow_inf_nan=False, description="Seconds it may take to begin an answer, or to go on."
    )

    @field_validator("url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        match = _URL.fullmatch(value)
        if match is None or (match["port"] and not 1 <= int(match["port"]) <= 65535):
            raise ValueError("must be http:// or https://, a host, and the path of the API")
        return value

    @property
    def address(self) -> tuple[str, int, str, bool]:
        """Host, port, path without a slash at its end, and whether it speaks TLS."""
        match = _URL.fullmatch(self.url)
        assert match is not None
        tls = match["scheme"] == "https"
        return (
            match["host"].strip("[]"),
            int(match["port"] or (443 if tls else 80)),
            (match["path"] or "").rstrip("/"),
            tls,
        )
