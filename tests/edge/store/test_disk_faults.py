"""A disk that refuses: each flush, rename and write of each command fails once, and nothing is lost or claimed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import WEIGHTS
from edge.errors import StoreError
from edge.store import Store, open_source
from tests.edge.bundles import FILES, write_bundle

SMALL = {**FILES, WEIGHTS: b"weights" * 99}
COMMANDS = {
    "install": lambda store, source: store.install(open_source(source)),
    "activate": lambda store, _: store.activate(named(store, 2), test=False),
    "rollback": lambda store, _: store.rollback(),
    "remove": lambda store, _: store.remove(named(store, 2)),
    "gc": lambda store, _: store.gc(),
}
Command = Callable[[Store, Path], Any]


class Disk:
    """Counts what is asked of the disk, and refuses one of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.refused: int | None = None
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "write_bytes"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self.asked += 1
            if self.asked == self.refused:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(*args, **options)

        return watched


def named(store: Store, counter: int) -> str:
    return next(each.name for each in store.list() if each.counter == counter)


def prepare(folder: Path, sources: list[Path], command: str) -> Store:
    """A store in which the command has something to do: the bundle 1 has worked, 2 is new, 0 came before 1."""
    store = Store(folder)
    for counter in (0, 1):
        store.activate(store.install(open_source(sources[counter])).name, test=False)
        if command != "rollback" or counter == 0:
            store.healthy(named(store, counter))
    if command != "install":
        store.install(open_source(sources[2]))
    return store


@pytest.mark.parametrize("command", COMMANDS)
def test_every_refusal(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [write_bundle(tmp_path / f"bundle{n}", {**SMALL, "own": bytes([n])}, counter=n) for n in range(3)]
    disk = Disk(monkeypatch)
    store = prepare(tmp_path / "whole", sources, command)
    begun = disk.asked
    COMMANDS[command](store, sources[2])
    for place in range(1, disk.asked - begun + 1):
        store = prepare(tmp_path / str(place), sources, command)
        before = store.active()
        assert before is not None
        disk.asked, disk.refused = 0, place
        with pytest.raises(StoreError, match="Input/output error"):
            COMMANDS[command](store, sources[2])
        disk.refused = None
        active = store.active()
        assert active is not None
        assert active.counter in {before.counter, {"activate": 2, "rollback": 0}.get(command)}
        for each in store.list():
            store.verify(each.name)
        again(store, command, sources[2])


def again(store: Store, command: str, source: Path) -> None:
    """The command works the next time, where it had not worked after all."""
    try:
        COMMANDS[command](store, source)
    except (StoreError, StopIteration):
        assert command in {"rollback", "remove"}
    active = store.active()
    assert active is not None
    assert active.counter == {"activate": 2, "rollback": 0}.get(command, 1)
    left = {each.counter for each in store.list()}
    assert left == ({0, 1} if command in {"remove", "gc"} else {0, 1, 2})
