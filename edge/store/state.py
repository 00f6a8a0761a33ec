"""What the store remembers, in one small file: which bundle is active, which came before, how low counters may be.

The file is replaced as a whole, so a power cut leaves the state before a change or the one after it. Changes are made
under a lock that is held for the time of one write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.durable import replace_durably
from edge.errors import StoreError
from edge.store.disk import locked

MAX_STARTS = 3
"""Starts of a bundle on trial; the next one goes back to the bundle before."""

_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,95}@[0-9a-f]{12}$")]


class State(BaseModel):
    """A snapshot; changes make new ones.

    A bundle that was switched to is on trial until it has shown that it works. Going back is always to one that has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    active: _Name | None = None
    """What is served."""
    previous: _Name | None = None
    """What was served before and worked."""
    starts: Annotated[int, Field(ge=0)] | None = None
    """How often the active bundle was started on trial; None once it has worked."""
    failed: _Name | None = None
    """What did not work and was left."""
    counters: Mapping[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """By model name the highest counter that has worked; lower ones are refused."""

    def switched_to(self, name: str) -> State:
        """``name`` is active and on trial, even if it has worked before; what worked last is where to go back to."""
        if name == self.previous and self.starts is not None:
            return self.rolled_back()  # the present one has not shown that it works
        previous = self.active if self.starts is None else self.previous
        failed = self.failed if self.failed != name else None
        return self.model_copy(update={"active": name, "previous": previous, "starts": 0, "failed": failed})

    def rolled_back(self) -> State:
        """The previous bundle is active again, and the present one nothing to go back to."""
        assert self.previous is not None
        return self.model_copy(update={"active": self.previous, "previous": None, "starts": None})

    def given_up(self) -> State:
        """The active bundle does not work: the previous one is active again, where there is one."""
        if self.previous is None:
            return self
        return self.rolled_back().model_copy(update={"failed": self.active})

    def started(self) -> State:
        """The active bundle is about to be loaded; on trial that is counted."""
        if self.starts is None:
            return self
        if self.starts >= MAX_STARTS and self.previous is not None:
            return self.given_up()
        return self.model_copy(update={"starts": self.starts + 1})

    def stopped(self) -> State:
        """The last start ended because somebody asked for it: it does not count."""
        return self.model_copy(update={"starts": self.starts - 1}) if self.starts else self

    def without(self, name: str) -> State:
        """``name`` is about to be removed."""
        gone = {field: None for field in ("previous", "failed") if getattr(self, field) == name}
        return self.model_copy(update=gone)

    def proven(self, model: str, counter: int) -> State:
        """The active bundle works."""
        counters = {**self.counters, model: max(counter, self.counters.get(model, 0))}
        if counters == self.counters and self.starts is None:
            return self
        return self.model_copy(update={"starts": None, "counters": counters})


class StateFile:
    """The file ``state.json`` of a store."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "state.json"
        self._lock = folder / "state.lock"

    def read(self) -> State:
        """The state; a new one where there is no file.

        Raises:
            StoreError: it is damaged.
            OSError: it cannot be read.
        """
        try:
            return State.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return State()
        except ValidationError:
            hint = f"remove it, and activate a bundle again: {self._path}"
            raise StoreError("what the model store remembers is damaged", hint=hint) from None

    def change(self, step: Callable[[State], State]) -> State:
        """Replace the state by what ``step`` makes of it; nothing is written where nothing changes.

        Raises:
            StoreError: the file is damaged.
            OSError: the disk refused.
        """
        with locked(self._lock):
            old = self.read()
            new = step(old)
            if new != old:
                replace_durably(self._path, json.dumps(new.model_dump(mode="json"), indent=2).encode() + b"\n")
            return new
