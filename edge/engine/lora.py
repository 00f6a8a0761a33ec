"""LoRA adapters at run time: their arrays as the graph wants them, and which row of a step uses which.

The graph has a place beside every linear (``export/lora.py`` tells the inputs). Only adapters that sequences use right
now are bound to it, since every row pays for all that are; without any, the places are empty and cost next to nothing.
``RunOptions.add_active_adapter`` is no way: onnxruntime ignores it for bound runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.adapter import AdapterConfig, AdapterFile, Place, read_adapter

WIDTH = 16
"""Columns of a group: as many as onnxruntime never shares out between threads, which would change last bits."""
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Linear:
    """A place of the graph: projections of one layer that share their input."""

    layer: int
    projections: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of this linear in every layer."""
        return "+".join(self.projections)

    def arrays(self, a: Array, b: Sequence[Array]) -> dict[str, Array]:
        """Graph inputs: A [projections, groups, 1, in, width] and for each projection B [groups * width, out]."""
        inputs = {f"lora.{self.layer}.{self.name}.a": a}
        return inputs | {f"lora.{self.layer}.{name}.b": each for name, each in zip(self.projections, b, strict=True)}


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that fits the loaded graph."""

    digest: str
    """Names what it computes: keys and values under another digest are others."""
    linears: frozenset[str]
    """Names of the linears that it changes in any layer."""
    groups: int
    """Groups of columns it takes in each of them."""
    arrays: Mapping[str, Array]
    """Graph inputs of those linears."""


class Places:
    """The places of a graph.

    Args:
        inputs: shapes of its inputs, by name; free dimensions are not ints.
    """

    def __init__(self, inputs: Mapping[str, Sequence[int | str]]) -> None:
        self.linears = tuple(_linear(name, inputs) for name in inputs if _is_a(name))

    def sizes(self) -> dict[Place, tuple[int, int]]:
        """In and out features of every projection."""
        return {
            (linear.layer, projection): (linear.in_features, out_features)
            for linear in self.linears
            for projection, out_features in zip(linear.projections, linear.out_features, strict=True)
        }

    def read(self, path: Path, config: AdapterConfig) -> Adapter:
        """Read an adapter's tensors and lay them out.

        Raises:
            AdapterError: the file is damaged, of an unsupported kind, or belongs to another model.
        """
        file = read_adapter(path, config, self.sizes())
        used = {linear.name for linear in self.linears if any(_keys(linear, file))}
        arrays: dict[str, Array] = {}
        for linear in self.linears:
            if linear.name in used:
                arrays |= _layout(linear, file)
        return Adapter(file.digest, frozenset(used), _num_groups(file), arrays)

    def stack(self, adapters: Sequence[Adapter]) -> dict[str, Array]:
        """The inputs for several adapters side by side; one alone is not copied, none is empty."""
        stacked: dict[str, Array] = {}
        for linear in self.linears:
            parts = [adapter.arrays for adapter in adapters if linear.name in adapter.linears]
            if not parts:
                parts = [_empty(linear)]
            for axis, name in zip((1, *(0 for _ in linear.projections)), _empty(linear), strict=True):
                arrays = [part[name] for part in parts]
                stacked[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)
        return stacked


class ActiveAdapters:
    """Which slot uses which adapter, and the arrays that are bound for them. The engine's thread only.

    Args:
        places: of the graph.
        slots: of the KV pool.
    """

    def __init__(self, places: Places, slots: int) -> None:
        self._places = places
        self._of_slot: list[Adapter | None] = [None] * slots
        self._bound: list[Adapter] = []
        self.version = 0
        """Changes with :attr:`arrays`."""
        self.arrays = places.stack([])
        """Inputs of all places."""
        self._owned: dict[str, Array] = {}
        self._share_out()

    def choose(self, slot: int, adapter: Adapter | None) -> None:
        """Let a slot use an adapter, or none.

        Raises:
            MemoryError: there is no memory to put adapters side by side; what is bound stays bound.
        """
        self._of_slot[slot] = adapter
        wanted = list(dict.fromkeys(each for each in self._of_slot if each is not None))
        # Several adapters are copied side by side: they stay so until that gets cheap again, or another one comes.
        if wanted != self._bound and (len(wanted) <= 1 or not set(wanted) <= set(self._bound)):
            self.arrays = self._places.stack(wanted)
            self._bound = wanted
            self.version += 1
        self._share_out()

    def groups(self) -> dict[str, Array]:
        """For every linear, by name, [groups, slots]: 1 where the slot's adapter owns the group."""
        return self._owned

    def _share_out(self) -> None:
        names = dict.fromkeys(linear.name for linear in self._places.linears)
        self._owned = {name: self._owners(name) for name in names}

    def _owners(self, linear: str) -> Array:
        rows = [
            [float(adapter is own) for own in self._of_slot]
            for adapter in self._bound
            if linear in adapter.linears
            for _ in range(adapter.groups)
        ]
        return np.array(rows or [[0.0] * len(self._of_slot)], np.float32)


class Binds(Protocol):
    """What inputs are bound to: :class:`edge.engine.session.Step`."""

    def bind_input(self, name: str, array: Array) -> None:
        """Bind an input to an array's memory, in place of what was bound before."""
        ...


class StepAdapters:
    """Keeps one step's adapters up to date.

    Args:
        active: of the engine.
        step: what the arrays are bound to.
        rows: of the step.
    """

    def __init__(self, active: ActiveAdapters, step: Binds, rows: int) -> None:
        self._active = active
        self._step = step
        self._rows = rows
        self._groups: dict[str, Array] = {}
        self._version = -1

    def update(self, slots: NDArray[np.int64]) -> None:
        """Before a run: row i of the step belongs to ``slots[i]``."""
        owned = self._active.groups()
        if self._version != self._active.version:
            self._rebind(owned)
        for name, table in owned.items():
            np.take(table, slots, axis=1, out=self._groups[name])

    def _rebind(self, owned: Mapping[str, Array]) -> None:
        for name, array in self._active.arrays.items():
            self._step.bind_input(name, array)
        self._groups = {name: np.zeros((len(table), self._rows), np.float32) for name, table in owned.items()}
        for name, groups in self._groups.items():
            self._step.bind_input(f"lora.{name}.groups", groups[:, :, None, None])
        self._version = self._active.version


def _is_a(name: str) -> bool:
    return name.startswith("lora.") and name.endswith(".a")


def _linear(name: str, inputs: Mapping[str, Sequence[int | str]]) -> Linear:
    _, layer, linear, _ = name.split(".")
    projections = tuple(linear.split("+"))
    out_features = tuple(int(inputs[f"lora.{layer}.{projection}.b"][1]) for projection in projections)
    return Linear(int(layer), projections, int(inputs[name][3]), out_features)


def _keys(linear: Linear, file: AdapterFile) -> Iterable[bool]:
    return ((linear.layer, projection) in file.pairs for projection in linear.projections)


def _num_groups(file: AdapterFile) -> int:
    return -(-file.rank // WIDTH)


def _empty(linear: Linear) -> dict[str, Array]:
    """The inputs of a place without adapters."""
    a = np.zeros((len(linear.projections), 1, 1, linear.in_features, 0), np.float32)
    return linear.arrays(a, [np.zeros((0, size), np.float32) for size in linear.out_features])


def _layout(linear: Linear, file: AdapterFile) -> dict[str, Array]:
    """One adapter's inputs of a place: transposed, in groups, zeros where it changes nothing."""
    groups = _num_groups(file)
    a = np.zeros((len(linear.projections), groups, 1, linear.in_features, WIDTH), np.float32)
    b = [np.zeros((groups * WIDTH, size), np.float32) for size in linear.out_features]
    for index, projection in enumerate(linear.projections):
        if pair := file.pairs.get((linear.layer, projection)):
            for start in range(0, file.rank, WIDTH):
                rows = pair[0][start : start + WIDTH]
                a[index, start // WIDTH, 0, :, : len(rows)] = rows.T
            b[index][: file.rank] = pair[1].T
    return linear.arrays(a, b)
