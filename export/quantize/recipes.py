"""Recipes: which number format each class of tensor gets.

A recipe is a table, not a program: ``layer`` has the projections of every layer, ``table`` is the embedding and the
output head (one table where they are tied), ``head`` says how logits come out of that table. ``docs/lab-notes.md`` has
the measurements behind the choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, Literal

from edge.bundle import EXACT_BLOCKS
from edge.errors import ConfigError

COARSE_BITS: Final = 4
"""Of a table's codes, those that a head in two stages multiplies with."""
NARROW: Final = 1024
"""Channels of hidden states: with fewer, a product has less to average errors over, and a model less to spare."""


@dataclass(frozen=True)
class Blockwise:
    """Integers in blocks along the input dimension: ``w = (code - zero_point) * scale``."""

    bits: int
    """4 or 8; of a table whose codes are taken apart for a head in two stages, 6 or 8."""
    block: int
    """Weights that share one scale and zero point."""
    symmetric: bool = False
    """Whether every zero point is half of the codes, and none is stored."""

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
    """A head that reads the upper 4 bits of the table's codes, and the rest for the rows of the best tokens only.

    The logits of the candidates are exact products with the table; all others stay coarse, but for the part of the
    input's largest channels, where most of the error would be.
    """

    candidates: int
    """Tokens per position whose logits are exact."""
    corrected: int = 32
    """Channels for which coarse logits are corrected."""


@dataclass(frozen=True)
class Projections:
    """Formats of the matrices of a layer: products that share an input share a matrix."""

    qkv: Format
    """Queries, keys and values."""
    out: Format
    gate_up: Format
    down: Format
    gates: Format = Blockwise(bits=8, block=32)
    """Decays and update rates of linear attention: a hundredth of a layer, and errors in them add up over tokens."""
    query_key: Format | None = None
    """Queries and keys of full attention, where theirs is another format."""
    value: Format | None = None
    """Values of full attention, where theirs is another format."""
    outer_down: Format | None = None
    """``down`` of the layers of :func:`is_outer`, where theirs is another format."""

    @property
    def splits_values(self) -> bool:
        """Whether the values of full attention are a product of their own."""
        return self.query_key is not None or self.value is not None

    @classmethod
    def all(cls, form: Format) -> Projections:
        """One format for all of them."""
        return cls(form, form, form, form, form)

    def down_of(self, layer: int, num_layers: int) -> Format:
        """The format of ``down`` in one of so many layers."""
        return (self.outer_down if is_outer(layer, num_layers) else None) or self.down

    def formats(self) -> dict[str, Format]:
        """Those that there are, by name; first those that every recipe has."""
        forms = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: form for name, form in forms.items() if form is not None}

    def describe(self) -> dict[str, Any]:
        """The same as it stands in the manifest."""
        return {name: _describe(form) for name, form in self.formats().items()}


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
    """Of the file of weights."""


@dataclass(frozen=True)
class Recipe:
    """Formats by tensor class, and how the kernels compute with them."""

    name: str
    layer: Projections
    table: Format
    head: TwoStage | None = None
    """None: every logit comes out of the table itself."""
    narrow: Projections | None = None
    """Instead of ``layer`` in models narrower than :data:`NARROW`; None = as in others."""
    narrow_calibrated: Projections | None = None
    """The same where weights are calibrated; None = as ``narrow``."""
    scales: Literal["float16", "float32"] = "float16"
    """How scales are stored. In float16 they take half of the disk, but as float32 memory: nothing maps them."""
    accuracy_level: int = 4
    """MatMulNBits: 4 = int8 activations (fast), 0 = float32 activations (for verification)."""
    dequantize: bool = False
    """Store each weight's quantized value as float32: the exact reference of the quantized graph."""
    purpose: str = ""
    """What it is for, in a few words."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    """By how weights are rounded: ``to nearest`` or ``calibrated``; of the 0.5B, or another model that is named."""

    @property
    def row_multiple(self) -> int:
        """:func:`row_multiple` of its formats."""
        forms = self.layer.formats()
        return row_multiple(form for name, form in forms.items() if name != "gates")

    def fitted(self, hidden_size: int, *, is_calibrated: bool) -> Recipe:
        """The recipe with the layers of one model, so many channels wide."""
        layer = self.layer
        if hidden_size < NARROW:
            layer = (self.narrow_calibrated if is_calibrated else None) or self.narrow or layer
        return replace(self, layer=layer, narrow=None, narrow_calibrated=None)

    def describe(self) -> dict[str, Any]:
        """The table as it stands in the manifest."""
        return {
            "name": self.name,
            "layer": self.layer.describe(),
            "table": _describe(self.table),
            "head": self._describe_head(),
            "scales": self.scales,
            "accuracy_level": self.accuracy_level,
        }

    def _describe_head(self) -> dict[str, Any]:
        if self.head is None:
            return {"format": "table"}
        assert isinstance(self.table, Blockwise)
        coarse = _describe(Blockwise(COARSE_BITS, self.table.block))
        return {"format": "two-stage", "coarse": coarse, **asdict(self.head)}


def is_outer(layer: int, num_layers: int) -> bool:
    """Whether a layer is of the first or the last quarter, where errors of ``down`` cost most."""
    quarter = num_layers // 4
    return not quarter <= layer < num_layers - quarter


def row_multiple(forms: Iterable[Format]) -> int:
    """Rows that products in these formats must have a multiple of, for a row to be rounded alike in every one.

    With larger blocks MatMulNBits sums the last of an odd number of rows in another order than all others, on x86; and
    so does a float product with a single row.
    """
    return 1 if all(isinstance(form, Blockwise) and form.block <= EXACT_BLOCKS[form.bits] for form in forms) else 2


MEASURED_ON = "Qwen2.5-Coder-0.5B-Instruct or the 1.5B on wikitext-2 and HumanEval (tests/bench/divergence.py)"
_NEAREST, _CALIBRATED, _WIDER = "to nearest", "calibrated", "calibrated, 1.5B"
_FOUR = Blockwise(bits=4, block=32)
_EIGHT = Blockwise(bits=8, block=64, symmetric=True)
_TABLE = Blockwise(bits=6, block=128)
"""Two bits fewer than 8 cost 0.001 nats and save a quarter; blocks of 32 would be a seventh more to read per token."""
_TWO_STAGE = TwoStage(candidates=128)
"""In two stages the head reads half as much."""
_MORE_CANDIDATES = TwoStage(candidates=512)
"""Two fifths less divergence from tokens that stay coarse, for a millisecond of one processor."""

RECIPES = {
    recipe.name: recipe
    for recipe in (
        # As few bytes as Q4_K_M of llama.cpp, which has more bits for narrow models, too: rows do not fit its blocks.
        # The MLP is nine tenths of a layer, and queries and keys are the least sensitive for their size.
        Recipe(
            "balanced",
            purpose="close to the original for its size; calibrate it",
            layer=Projections(qkv=_EIGHT, out=_EIGHT, gate_up=_FOUR, down=_FOUR, query_key=_FOUR),
            narrow=Projections(qkv=_EIGHT, out=_EIGHT, gate_up=_FOUR, down=_FOUR, outer_down=_EIGHT),
            # What calibration leaves of the error is largest in down.
            narrow_calibrated=Projections(qkv=_EIGHT, out=_EIGHT, gate_up=_FOUR, down=_EIGHT),
            table=_TABLE,
            head=_MORE_CANDIDATES,
            measured={
                _NEAREST: Measured(kl=0.0267, top1=0.920, perplexity_change=0.016, megabytes=359),
                _CALIBRATED: Measured(kl=0.0133, top1=0.947, perplexity_change=0.025, megabytes=382),
                _WIDER: Measured(kl=0.0213, top1=0.913, perplexity_change=0.015, megabytes=976),
            },
        ),
        # Large blocks compute faster and read less. The small attention matrices get the bits that this saves.
        Recipe(
            "fast",
            purpose="for devices: prefill a quarter faster than balanced, and less memory",
            layer=Projections(
                qkv=Blockwise(bits=8, block=64),
                out=Blockwise(bits=8, block=64),
                gate_up=Blockwise(bits=4, block=128),
                down=Blockwise(bits=4, block=128),
            ),
            table=_TABLE,
            head=_TWO_STAGE,
            scales="float32",
            measured={_NEAREST: Measured(kl=0.0562, top1=0.882, perplexity_change=0.038, megabytes=326)},
        ),
        Recipe(
            "small",
            purpose="where every megabyte counts; calibrate it",
            layer=replace(Projections.all(_FOUR), gates=Blockwise(bits=8, block=32), value=_EIGHT),
            table=_FOUR,
            measured={
                _NEAREST: Measured(kl=0.0649, top1=0.864, perplexity_change=0.059, megabytes=288),
                _CALIBRATED: Measured(kl=0.0358, top1=0.900, perplexity_change=0.063, megabytes=288),
            },
        ),
        Recipe(
            "nodot",
            purpose="for ARM cores without dot products, where 8 bits are slow: Cortex-A53, A72 (Raspberry Pi 3, 4)",
            layer=replace(Projections.all(_FOUR), gates=Float32()),
            table=_TABLE,
            head=_TWO_STAGE,
            measured={_NEAREST: Measured(kl=0.0616, top1=0.880, perplexity_change=0.056, megabytes=315)},
        ),
        Recipe(
            "quality",
            purpose="nearly the original, reads twice as much per token as fast",
            layer=Projections.all(Blockwise(bits=8, block=32, symmetric=True)),
            table=Blockwise(bits=8, block=32, symmetric=True),
            measured={_NEAREST: Measured(kl=0.0010, top1=0.990, perplexity_change=-0.002, megabytes=525)},
        ),
        Recipe(
            "int8",
            purpose="8 bits in large blocks: less to read than quality",
            layer=Projections.all(Blockwise(bits=8, block=128)),
            table=Blockwise(bits=8, block=128),
            head=_TWO_STAGE,
            measured={_NEAREST: Measured(kl=0.0035, top1=0.975, perplexity_change=0.011, megabytes=509)},
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
    return {"format": "blockwise", **asdict(what)}
