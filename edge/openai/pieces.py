"""What an answer's text consists of, for the reader's eye and for programs."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text from inside the ``<think>`` block."""

    text: str


@dataclass(frozen=True)
class Call:
    """A tool call begins; :class:`Arguments` pieces with its index continue it."""

    index: int
    """Calls before it in the answer."""
    id: str
    name: str
    arguments: str
    """The beginning of the arguments' JSON text, often empty."""


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments."""

    index: int
    """The call's."""
    text: str
    """JSON text that follows what came before."""


Piece = Content | Reasoning | Call | Arguments


def new_call_id() -> str:
    """An id for a call, as OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"


def complete_calls(pieces: Sequence[Piece]) -> list[Call]:
    """The calls among the pieces of an answer, each with all of its arguments."""
    rest: dict[int, str] = {}
    for piece in pieces:
        if isinstance(piece, Arguments):
            rest[piece.index] = rest.get(piece.index, "") + piece.text
    return [
        Call(piece.index, piece.id, piece.name, piece.arguments + rest.get(piece.index, ""))
        for piece in pieces
        if isinstance(piece, Call)
    ]
