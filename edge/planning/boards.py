"""The boards of ``firmware-configs`` as machines to plan for."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from edge.errors import ConfigError
from edge.planning.machine import Machine

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cpu(_Model):
    """One kind of core."""

    features: tuple[str, ...]
    """Those of /proc/cpuinfo that decide about kernels."""
    ops_per_cycle: Positive
    """Of integer products (floating-point ones without int8 kernels), in the best format."""
    attention_flops_per_cycle: Positive
    dequantize_cycles: float = 0.0
    """For each weight of 8 bits at each use, without int8 kernels."""
    speed: Positive
    """Of one core at what is no kernel (Python, hashing), relative to the machine of docs/planning.md."""


class Board(_Model):
    """One board of ``boards.toml``."""

    title: str
    cpu: str
    cores: Annotated[int, Field(gt=0)]
    clock_ghz: Positive
    bandwidth_gbs: Positive
    read_share: Positive
    bandwidth_source: str
    ram_gib: tuple[int, ...]
    memory_share: Positive
    storage_mbs: Positive
    power_w: Positive | None = None
    power_source: str = ""

    def machine(self, cpu: Cpu, ram_gib: int | None = None) -> Machine:
        """What formulas need to know of it; with the least RAM that the board is made for, or another size."""
        hertz = self.cores * self.clock_ghz
        return Machine(
            title=self.title,
            cores=self.cores,
            features=cpu.features,
            read_gbs=self.bandwidth_gbs * self.read_share,
            read_source=f"{self.bandwidth_gbs:g} GB/s x {self.read_share:g}: {self.bandwidth_source}",
            gops=hertz * cpu.ops_per_cycle,
            attention_gflops=hertz * cpu.attention_flops_per_cycle,
            dequantize_ns=cpu.dequantize_cycles / hertz,
            speed=cpu.speed,
            storage_mbs=self.storage_mbs,
            memory_bytes=int((ram_gib or min(self.ram_gib)) * (1 << 30) * self.memory_share),
            power_w=self.power_w,
            power_source=self.power_source,
        )


@cache
def known_boards() -> Mapping[str, Board]:
    """The boards by the names of their folders."""
    return {name: Board.model_validate(entry) for name, entry in _read()["boards"].items()}


def board_named(name: str, ram_gib: int | None = None) -> Machine:
    """A board as a machine.

    Args:
        name: its folder in ``firmware-configs``.
        ram_gib: its memory; None = the least that it is made for.

    Raises:
        ConfigError: there is no such board.
    """
    boards = known_boards()
    if name not in boards:
        raise ConfigError(f"there is no board {name!r}", hint=f"boards: {', '.join(boards)}; or --here")
    return boards[name].machine(Cpu.model_validate(_read()["cpus"][boards[name].cpu]), ram_gib)


@cache
def _read() -> Mapping[str, Any]:
    return tomllib.loads(files("edge.planning").joinpath("boards.toml").read_text(encoding="utf-8"))
