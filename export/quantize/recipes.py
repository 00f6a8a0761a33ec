"""Recipes: which number format each class of tensor gets.

A recipe is a table, not a program: ``layer`` has the projections of every layer, ``table`` is the embedding and the
output head (one table where they are tied), ``head`` says how logits come out of that table. ``docs/lab-notes.md`` has
the measurements behind the choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from edge.errors import ConfigError

_EXACT_BLOCKS = {4: 32, 8: 64}
"""By bits, the largest blocks with which a row has the same bits in every product (docs/lab-notes.md)."""


@dataclass(frozen=True)
class Blockwise:
    """Asymmetric integers in blocks along the input dimension: ``w = (code - zero_point) * scale``."""

    bits: int
    """4 or 8."""
    block: int
    """Weights that share one scale and zero point."""

    def fit(self, columns: int) -> Blockwise:
        """This format with the largest block that divides ``columns``, or padded blocks of 32 where none does."""
        block = self.block
        while block > 32 and columns % block:
            block //= 2
        return replace(self, block=block)


@dataclass(frozen=True)
class Float32:
    """Plain float32 weights: the reference."""


Format = Blockwise | Float32


@dataclass(frozen=True)
class TwoStage:
    """A head that reads a coarse copy of its table whole, and of the table itself the rows of the best tokens only.

    The logits of the candidates are exact products with the table; all others stay coarse.
    """

    coarse: Blockwise
    candidates: int
    """Tokens per position whose logits are exact."""


@dataclass(frozen=True)
class Projections:
    """Formats of the matrices of a layer: products that share an input share a matrix."""

    qkv: Format
    out: Format
    gate_up: Format
    down: Format
    gates: Format = Blockwise(bits=8, block=32)
    """Decays and update rates of linear attention: a hundredth of a layer, and errors in them add up over tokens."""

    @classmethod
    def all(cls, form: Format) -> Projections:
        """One format for all of them."""
        return cls(form, form, form, form, form)


@dataclass(frozen=True)
class Measured:
    """What a recipe cost one model, see :data:`MEASURED_ON`."""

    kl: float
    """Mean divergence of the next token's distribution, in nats."""
    top1: float
    """Share of places with the same most likely token."""
    perplexity_change: float
    """Relative to float32."""
    megabytes: int
    """Of weights on disk."""


@dataclass(frozen=True)
class Recipe:
    """Formats by tensor class, and how the kernels compute with them."""

    name: str
    layer: Projections
    table: Format
    head: TwoStage | None = None
    """None: every logit comes out of the table itself."""
    accuracy_level: int = 4
    """MatMulNBits: 4 = int8 activations (fast), 0 = float32 activations (for verification)."""
    dequantize: bool = False
    """Store each weight's quantized value as float32: the exact reference of the quantized graph."""
    purpose: str = ""
    """What it is for, in a few words."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    """By how weights are rounded: ``to nearest`` or ``calibrated``."""

    @property
    def row_multiple(self) -> int:
        """:func:`row_multiple` of its formats."""
        return row_multiple([self.layer.qkv, self.layer.out, self.layer.gate_up, self.layer.down])

    def describe(self) -> dict[str, Any]:
        """The table as it stands in the manifest."""
        return {
            "name": self.name,
            "layer": {part.name: _describe(getattr(self.layer, part.name)) for part in fields(self.layer)},
            "table": _describe(self.table),
            "head": _describe_head(self.head),
            "accuracy_level": self.accuracy_level,
        }


def row_multiple(forms: Iterable[Format]) -> int:
    """Rows that products in these formats must have a multiple of, for a row to be rounded alike in every one.

    With larger blocks MatMulNBits sums the last of an odd number of rows in another order than all others, on x86; and
    so does a float product with a single row.
    """
    return 1 if all(isinstance(form, Blockwise) and form.block <= _EXACT_BLOCKS[form.bits] for form in forms) else 2


MEASURED_ON = "Qwen2.5-Coder-0.5B-Instruct on wikitext-2 and HumanEval (tests/bench/divergence.py)"
_NEAREST, _CALIBRATED = "to nearest", "calibrated"
_TABLE = Blockwise(bits=8, block=128)
"""The 8-bit table costs nothing visible with blocks of 128 and reads 15% less per token than with blocks of 32."""
_COARSE = TwoStage(Blockwise(bits=4, block=128), candidates=128)
"""In two stages the head reads half as much. A coarse copy in 2 bits would be smaller still, but tokens outside the
candidates are sampled too, and diverge twenty times as much with it."""

RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The MLP is nine tenths of a layer and the least sensitive for its size: large blocks, which compute faster and
        # read less. The small attention matrices get the bits that this saves.
        Recipe(
            "balanced",
            purpose="for devices: fast, small, close to the original",
            layer=Projections(
                qkv=Blockwise(bits=8, block=64),
                out=Blockwise(bits=8, block=64),
                gate_up=Blockwise(bits=4, block=128),
                down=Blockwise(bits=4, block=128),
            ),
            table=_TABLE,
            head=_COARSE,
            measured={
                _NEAREST: Measured(kl=0.0554, top1=0.885, perplexity_change=0.043, megabytes=439),
                _CALIBRATED: Measured(kl=0.0421, top1=0.899, perplexity_change=0.042, megabytes=439),
            },
        ),
        Recipe(
            "small",
            purpose="where every megabyte counts; calibrate it",
            layer=Projections(
                qkv=Blockwise(bits=8, block=64),
                out=Blockwise(bits=4, block=32),
                gate_up=Blockwise(bits=4, block=128),
                down=Blockwise(bits=4, block=128),
            ),
            table=Blockwise(bits=4, block=128),
            measured={
                _NEAREST: Measured(kl=0.0840, top1=0.839, perplexity_change=0.072, megabytes=289),
                _CALIBRATED: Measured(kl=0.0681, top1=0.843, perplexity_change=0.077, megabytes=289),
            },
        ),
        Recipe(
            "quality",
            purpose="nearly the original, reads twice as much per token as balanced",
            layer=Projections.all(Blockwise(bits=8, block=32)),
            table=_TABLE,
            measured={_NEAREST: Measured(kl=0.0011, top1=0.980, perplexity_change=0.000, megabytes=564)},
        ),
        Recipe(
            "int8",
            purpose="8 bits in large blocks: less to read than quality",
            layer=Projections.all(Blockwise(bits=8, block=128)),
            table=_TABLE,
            head=_COARSE,
            measured={_NEAREST: Measured(kl=0.0058, top1=0.980, perplexity_change=0.012, megabytes=595)},
        ),
        Recipe("fp32", purpose="the reference for comparisons", layer=Projections.all(Float32()), table=Float32()),
    )
}
DEFAULT: Final = "balanced"


def recipe_named(name: str) -> Recipe:
    """Look up a recipe.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}", hint=f"recipes: {', '.join(RECIPES)}", param="recipe")
    return RECIPES[name]


def _describe(what: Format) -> dict[str, Any]:
    if isinstance(what, Float32):
        return {"format": "float32"}
    return {"format": "blockwise", **asdict(what), "symmetric": False}


def _describe_head(head: TwoStage | None) -> dict[str, Any]:
    if head is None:
        return {"format": "table"}
    return {"format": "two-stage", "coarse": _describe(head.coarse), "candidates": head.candidates}
