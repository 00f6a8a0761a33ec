"""The lines of the log: as text for people, as JSON for programs."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final

_TEXT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
FIELDS: Final = "fields"
"""Attribute of a record (``extra={"fields": {...}}``): what JSON lines tell apart, beside the message."""


class TextFormatter(logging.Formatter):
    """Keeps control characters of a message from starting a line of their own, so that nobody can forge records."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line of a record, without a traceback."""
        text = super().formatMessage(record)
        return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, its traceback within."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
