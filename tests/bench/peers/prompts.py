"""What the contestants read: manuals, logs and code of an imaginary bottling plant, the same in every run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.bundle import CHAT_TEMPLATE, TOKENIZER
from edge.chat import ChatTemplate
from edge.tokenizer import Tokenizer

Message = dict[str, str]

_MACHINES = (
    "filler",
    "capper",
    "labeller",
    "rinser",
    "palletiser",
    "conveyor",
    "carbonator",
    "steriliser",
    "pasteuriser",
)
_PARTS = ("drive belt", "inlet valve", "gearbox", "pressure sensor", "level probe", "bearing", "seal", "encoder", "fan")
_PEOPLE = ("the shift lead", "the electrician", "the operator", "the maintenance team", "the quality office")
_RULES = (
    "Before the {part} of {machine} {number} is opened, {person} locks the main switch and waits {minutes} minutes.",
    "If {machine} {number} stops twice within {minutes} minutes, {person} checks the {part} and writes a note.",
    "The {part} of {machine} {number} is cleaned every {hours} hours of operation; a worn one is replaced at once.",
    "Pressure at {machine} {number} stays between {low}.2 and {low}.8 bar; {person} is told when it leaves them.",
    "When {person} changes the format, {machine} {number} runs at {percent} percent speed for {minutes} minutes.",
    "A spare {part} for {machine} {number} lies in rack {rack}; whoever takes it orders a new one on the same day.",
    "Above {degrees} degrees the {part} of {machine} {number} must cool down, which takes about {minutes} minutes.",
    "{machine} {number} may be restarted by {person} only after the {part} has been inspected and the guard is closed.",
)
_ROUTINE = (
    "cycle complete, {number} bottles, {percent} percent of nominal speed",
    "temperature {degrees}.4 C, pressure {low}.5 bar, within limits",
    "{part} lubricated, next service in {hours} h",
    "format change finished after {minutes} min",
    "heartbeat ok, queue length {low}",
    "operator acknowledged the message of {minutes} min ago",
)


@dataclass(frozen=True)
class Event:
    """An alarm in the log, as the extraction should find it."""

    time: str
    device: str
    severity: str
    code: str

    def line(self, text: str) -> str:
        """As the log has it."""
        return f"{self.time} {self.device} {self.severity.upper()} {self.code}: {text}"


_ALARMS = (
    (Event("06:12:40", "filler-2", "warning", "W-207"), "level probe out of range"),
    (Event("06:31:05", "capper-1", "error", "E-114"), "torque too low on head 6"),
    (Event("07:02:18", "conveyor-4", "error", "E-031"), "drive belt slips"),
    (Event("07:45:52", "pasteuriser-1", "critical", "C-002"), "outlet temperature too low"),
    (Event("08:20:33", "labeller-3", "warning", "W-310"), "label roll ends in 90 m"),
    (Event("08:57:09", "palletiser-1", "critical", "C-017"), "light curtain interrupted"),
)
EVENTS = tuple(event for event, _ in _ALARMS)
"""What the extraction should find."""
GREETING_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"greeting": {"type": "string", "maxLength": 12}},
    "required": ["greeting"],
    "additionalProperties": False,
}
EVENTS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "events": {
            "type": "array",
            "minItems": len(EVENTS),
            "maxItems": len(EVENTS),
            "items": {
                "type": "object",
                "properties": {
                    "time": {"type": "string", "pattern": "^[0-9]{2}:[0-9]{2}:[0-9]{2}$"},
                    "device": {"type": "string"},
                    "severity": {"type": "string", "enum": ["warning", "error", "critical"]},
                    "code": {"type": "string", "pattern": "^[WEC]-[0-9]{3}$"},
                    "message": {"type": "string", "maxLength": 40},
                },
                "required": ["time", "device", "severity", "code", "message"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["events"],
    "additionalProperties": False,
}

CODE = """\
import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass
class Reading:
    sensor: str
    value: float
    unit: str


class PressureMonitor:
    def __init__(self, low: float, high: float, window: int = 10) -> None:
        self.low = low
        self.high = high
        self.window = window
        self.readings: list[Reading] = []

    def add(self, reading: Reading) -> None:
        if reading.unit != "bar":
            raise ValueError(f"unexpected unit {reading.unit}")
        self.readings.append(reading)
        if len(self.readings) > self.window:
            self.readings.pop(0)

    def calc(self) -> float:
        if not self.readings:
            return 0.0
        return sum(reading.value for reading in self.readings) / len(self.readings)

    def check(self) -> bool:
        mean = self.calc()
        if mean < self.low:
            log.warning("mean pressure %.2f bar is below %.2f bar", mean, self.low)
            return False
        if mean > self.high:
            log.warning("mean pressure %.2f bar is above %.2f bar", mean, self.high)
            return False
        return True
"""
EDITED_CODE = CODE.replace("calc(", "mean_pressure(")
"""What the edit should come to."""


class Reader:
    """Counts and makes token ids as qwedge does; the peers have the same tokenizer and template."""

    def __init__(self, bundle: Path) -> None:
        self._tokenizer = Tokenizer.load(bundle / TOKENIZER)
        self._template = ChatTemplate.load(bundle / CHAT_TEMPLATE)
        ends = (self._tokenizer.id_of(token) for token in ("<|im_end|>", "<|endoftext|>"))
        self.ends = [token for token in ends if token is not None]

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """A conversation, ready for the answer."""
        return self._template.encode(self._tokenizer, messages)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        return self._tokenizer.decode(ids)

    def fit(self, build: Callable[[str], list[Message]], text: str, num_tokens: int) -> list[Message]:
        """The conversation with as much of ``text``, in whole words, as ``num_tokens`` allow."""
        words = text.split(" ")
        fewest, most = 0, len(words)
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fits = len(self.encode(build(" ".join(words[:middle])))) <= num_tokens
            fewest, most = (middle, most) if fits else (fewest, middle - 1)
        assert fewest < len(words), "the text is too short for so many tokens"
        return build(" ".join(words[:fewest]))


def manual(seed: int, num_rules: int) -> str:
    """Rules of work, in sentences."""
    rules = _sentences(seed, _RULES)
    return "\n".join(f"{number}. {next(rules)}" for number in range(1, num_rules + 1))


def shift_log(seed: int, num_lines: int) -> str:
    """Lines in which nothing happens."""
    source = random.Random(seed)
    remarks = _sentences(seed, _ROUTINE)
    lines = []
    for minute in range(num_lines):
        device = f"{source.choice(_MACHINES)}-{source.randint(1, 4)}"
        clock = f"{6 + minute // 60:02}:{minute % 60:02}:{source.randint(0, 59):02}"
        lines.append(f"2026-03-14 {clock} {device} INFO {next(remarks)}")
    return "\n".join(lines)


def alarm_log() -> str:
    """About 600 tokens: :data:`EVENTS`, each with what else was noted at the time."""
    remarks = _sentences(4, _RULES)
    entries = (f"{event.line(text)}\n  {next(remarks)}\n  {next(remarks)}" for event, text in _ALARMS)
    return "\n".join(entries)


def chat(system: str, user: str) -> list[Message]:
    """One turn."""
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _sentences(seed: int, templates: Sequence[str]) -> Iterator[str]:
    source = random.Random(seed)
    while True:
        sentence = source.choice(templates).format(
            machine=source.choice(_MACHINES),
            part=source.choice(_PARTS),
            person=source.choice(_PEOPLE),
            number=source.randint(1, 480),
            minutes=source.randint(2, 45),
            hours=source.randint(2, 90) * 10,
            low=source.randint(1, 6),
            percent=source.randint(30, 99),
            degrees=source.randint(40, 85),
            rack=f"{source.choice('ABCDEF')}{source.randint(1, 30)}",
        )
        yield sentence[0].upper() + sentence[1:]
