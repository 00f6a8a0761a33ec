"""The newest lines of the log, for those who have no shell on the device.

Logs hold no prompts and no answers, so these lines do not either; of an exception only the type is kept, since its
message may quote what it failed on.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Final

MAX_LINES: Final = 1000
"""Lines that are kept."""
MAX_MESSAGE: Final = 2000
"""Characters of a message that are kept."""


@dataclass(frozen=True)
class LogLine:
    """One record of the log."""

    number: int
    """1, 2, 3, ... since the start: a gap shows that lines were lost."""
    time: float
    """Seconds since 1970."""
    level: str
    """``DEBUG``, ``INFO``, ``WARNING``, ``ERROR`` or ``CRITICAL``."""
    logger: str
    message: str


class LogBuffer(logging.Handler):
    """A bounded ring of log lines; the oldest go first.

    Args:
        capacity: lines that are kept.
    """

    def __init__(self, capacity: int = MAX_LINES) -> None:
        super().__init__()
        self._lines: deque[LogLine] = deque(maxlen=capacity)  # guarded by the handler's lock
        self._number = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record; logging calls this under the handler's lock."""
        message = record.getMessage()[:MAX_MESSAGE]
        if record.exc_info and record.exc_info[0] is not None:
            message += f" ({record.exc_info[0].__name__})"
        self._number += 1
        self._lines.append(LogLine(self._number, record.created, record.levelname, record.name, message))

    def after(self, number: int, level: int = logging.NOTSET, most: int = MAX_LINES) -> list[LogLine]:
        """The newest lines that follow a line.

        Args:
            number: of the last line that is known already; 0 for none.
            level: least level of the lines.
            most: lines.
        """
        self.acquire()
        try:
            found = (line for line in reversed(self._lines) if line.number > number and _level(line) >= level)
            return list(islice(found, most))[::-1]
        finally:
            self.release()


def _level(line: LogLine) -> int:
    return logging.getLevelNamesMapping().get(line.level, logging.CRITICAL)
