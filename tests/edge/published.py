"""Published figures beside the predictions of `qwedge plan`: the rows of ``published_speeds.toml``.

    .venv/bin/python -m tests.edge.published

prints the table of docs/planning.md.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edge.planning.boards import board_named
from edge.planning.machine import Machine
from edge.planning.models import shape_of
from edge.planning.shape import Format, Product, Shape
from edge.planning.speed import Speed, predict_speed

ROWS = Path(__file__).with_name("published_speeds.toml")
MOST_DEVIATION = 0.25
PROMPT = 128
"""Tokens of the published runs, where they say it."""
GPU_READ_SHARE, NPU_READ_SHARE = 0.8, 0.76
NPU_SPEED = 0.4
"""An NPU's driver takes five milliseconds for a step of 24 layers."""
Q8_0_SHARE = 0.24
"""llama.cpp's products in Q8_0, which it does not repack, to those in Q4_0, which it does; from two of the rows."""


@dataclass(frozen=True)
class Row:
    """One published measurement."""

    device: str
    engine: str
    model: str
    format: str
    bits: tuple[float, float]
    """Of a layer's weight and of the head's."""
    decode: float
    """Tokens a second."""
    source: str
    prefill: float | None = None
    board: str | None = None
    """Whose description predicts it; None where it is only ``gbs``."""
    gbs: float = 0.0
    why_not: str = ""

    def predicted(self) -> Speed:
        """What the formulas say."""
        return predict_speed(self._shape(), self._machine(), prompt_tokens=PROMPT)

    def _shape(self) -> Shape:
        shape = shape_of(self.model)
        layers, head = (Format(bits, block=1, block_bytes=0) for bits in self.bits)
        parts = tuple(replace(product, form=layers) for product in shape.layers)
        return replace(shape, layers=parts, head=_in(shape.head, head), correction=None, candidates=0)

    def _machine(self) -> Machine:
        if self.board is not None:
            machine = board_named(self.board)
            return replace(machine, gops=machine.gops * Q8_0_SHARE) if self.bits[0] == 8.5 else machine
        shares = {"gpu": (GPU_READ_SHARE, 20.0), "npu": (NPU_READ_SHARE, NPU_SPEED)}
        share, speed = shares[self.engine]
        return Machine(
            title=self.device,
            cores=1,
            features=("asimddp",),
            read_gbs=self.gbs * share,
            read_source="",
            gops=1000,
            attention_gflops=200,
            dequantize_ns=0,
            speed=speed,
            storage_mbs=1000,
            memory_bytes=0,
            power_w=None,
        )


def rows() -> list[Row]:
    """All of them, in the order of the file."""
    entries = tomllib.loads(ROWS.read_text("utf-8"))["row"]
    return [Row(**{**entry, "bits": tuple(entry["bits"])}) for entry in entries]


def table() -> Iterator[str]:
    """The lines of docs/planning.md."""
    yield "| device | model | format, runtime | published | predicted | off by | source |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows():
        speed = row.predicted()
        figures = [("decode", row.decode, speed.decode_tokens_per_second)]
        if row.prefill is not None:
            figures.append(("prefill", row.prefill, speed.prefill_tokens_per_second))
        for what, published, predicted in figures:
            off = f"{predicted / published - 1:+.0%}"
            reason = f"; no case: {row.why_not}" if row.why_not else ""
            device = f"{row.device} ({row.engine})"
            numbers = f"{what} {published:g} | {predicted:.3g} | {off}"
            yield f"| {device} | {row.model} | {row.format} | {numbers} | {row.source}{reason} |"


def _in(product: Product, form: Format) -> Product:
    return replace(product, form=form)


if __name__ == "__main__":
    print("\n".join(table()))
