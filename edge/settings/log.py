"""``[log]``: what is written to stderr."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edge.settings.section import Section


class LogSettings(Section):
    """Logs, written to stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level written.")
