"""``[log]``: what is written to stderr, and the audit log."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from edge.settings.section import Section


class LogSettings(Section):
    """Logs, written to stderr, and the audit log. Neither ever holds a prompt or an answer."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level written.")
    format: Literal["text", "json"] = Field("text", description="Lines for people, or one JSON object a line.")
    audit: Path | None = Field(
        None,
        description="File of the audit log: a JSON line for each HTTP request, with who asked for what, when, from"
        " where, how long it took and how many tokens. Without it, there is none.",
    )
    audit_mb: int = Field(
        16, ge=1, le=1 << 16, description="MiB of an audit log, of which this one and the last four are kept."
    )
