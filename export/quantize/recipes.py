"""Recipes: which number format each class of tensor gets.

A recipe is a table, not a program: ``layer`` has the projections of every layer, ``table`` is the embedding and the
output head (one table where they are tied), ``head`` says how logits come out of that table. ``docs/lab-notes.md`` has
the measurements behind the choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, Literal

from edge.errors import ConfigError

_EXACT_BLOCKS = {4: 32, 8: 64}
"""By bits, the largest blocks with which a row has the same bits in every product (docs/lab-notes.md)."""


@dataclass(frozen=True)
class Blockwise:
    """Integers in blocks along the input dimension: ``w = (code - zero_point) * scale``."""

    bits: int
    """4 or 8."""
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
    """A head that reads the upper halves of the table's 8-bit codes, and the rest for the rows of the best tokens only.

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
    value: Format | None = None
    """Values of full attention, where theirs is another format than that of queries and keys."""

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
    """Of the file of weights."""


@dataclass(frozen=True)
class Recipe:
    """Formats by tensor class, and how the kernels compute with them."""

    name: str
    layer: Projections
    table: Format
    head: TwoStage | None = None
    """None: every logit comes out of the table itself."""
    calibrated_down: Format | None = None
    """Where weights are calibrated, the format of ``down`` in the layers of :func:`is_sensitive`; None = no other."""
    scales: Literal["float16", "float32"] = "float16"
    """How scales are stored. In float16 they take half of the disk, but as float32 memory: nothing maps them."""
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
        layer = self.layer
        forms = [layer.qkv, layer.value, layer.out, layer.gate_up, layer.down, self.calibrated_down]
        return row_multiple(form for form in forms if form is not None)

    def down(self, layer: int, num_layers: int, *, is_calibrated: bool) -> Format:
        """Format of ``down`` in one of so many layers."""
        if self.calibrated_down is not None and is_calibrated and is_sensitive(layer, num_layers):
            return self.calibrated_down
        return self.layer.down

    def layer_formats(self) -> dict[str, Format]:
        """Formats of a layer's matrices by name, those first that every recipe has."""
        forms = {part.name: getattr(self.layer, part.name) for part in fields(self.layer)}
        forms["calibrated_down"] = self.calibrated_down
        return {name: form for name, form in forms.items() if form is not None}

    def describe(self) -> dict[str, Any]:
        """The table as it stands in the manifest."""
        return {
            "name": self.name,
            "layer": {name: _describe(form) for name, form in self.layer_formats().items()},
            "table": _describe(self.table),
            "head": self._describe_head(),
            "scales": self.scales,
            "accuracy_level": self.accuracy_level,
        }

    def _describe_head(self) -> dict[str, Any]:
        if self.head is None:
            return {"format": "table"}
        assert isinstance(self.table, Blockwise)
        coarse = _describe(Blockwise(4, self.table.block))
        return {"format": "two-stage", "coarse": coarse, **asdict(self.head)}


def is_sensitive(layer: int, num_layers: int) -> bool:
    """Whether a layer is one of the first or last eighth, or every third between: as in llama.cpp's mixes."""
    edge = num_layers // 8
    return layer < edge or layer >= 7 * num_layers // 8 or (layer - edge) % 3 == 2


def row_multiple(forms: Iterable[Format]) -> int:
    """Rows that products in these formats must have a multiple of, for a row to be rounded alike in every one.

    With larger blocks MatMulNBits sums the last of an odd number of rows in another order than all others, on x86; and
    so does a float product with a single row.
    """
    return 1 if all(isinstance(form, Blockwise) and form.block <= _EXACT_BLOCKS[form.bits] for form in forms) else 2


MEASURED_ON = "Qwen2.5-Coder-0.5B-Instruct on wikitext-2 and HumanEval (tests/bench/divergence.py)"
_NEAREST, _CALIBRATED = "to nearest", "calibrated"
_FOUR = Blockwise(bits=4, block=32)
_EIGHT = Blockwise(bits=8, block=64, symmetric=True)
_TABLE = Blockwise(bits=8, block=128)
"""The 8-bit table costs nothing visible with blocks of 128 and reads 15% less per token than with blocks of 32."""
_TWO_STAGE = TwoStage(candidates=128)
"""In two stages the head reads half as much."""
_MORE_CANDIDATES = TwoStage(candidates=512)
"""Two fifths less divergence from tokens that stay coarse, for a millisecond of one processor."""

RECIPES = {
    recipe.name: recipe
    for recipe in (
        # As few bytes as Q4_K_M of llama.cpp. The MLP is nine tenths of a layer and the least sensitive for its size.
        Recipe(
            "balanced",
            purpose="close to the original for its size; calibrate it",
            layer=Projections(qkv=_EIGHT, out=_EIGHT, gate_up=_FOUR, down=_FOUR),
            table=_TABLE,
            head=_MORE_CANDIDATES,
            # What calibration leaves of the error is largest here.
            calibrated_down=_EIGHT,
            measured={
                _NEAREST: Measured(kl=0.0285, top1=0.909, perplexity_change=0.047, megabytes=369),
                _CALIBRATED: Measured(kl=0.0137, top1=0.931, perplexity_change=0.018, megabytes=393),
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
            measured={_NEAREST: Measured(kl=0.0522, top1=0.888, perplexity_change=0.034, megabytes=360)},
        ),
        Recipe(
            "small",
            purpose="where every megabyte counts; calibrate it",
            layer=replace(Projections.all(_FOUR), gates=Blockwise(bits=8, block=32), value=_EIGHT),
            table=_FOUR,
            measured={
                _NEAREST: Measured(kl=0.0572, top1=0.867, perplexity_change=0.082, megabytes=288),
                _CALIBRATED: Measured(kl=0.0330, top1=0.897, perplexity_change=0.064, megabytes=288),
            },
        ),
        Recipe(
            "nodot",
            purpose="for ARM cores without dot products, where 8 bits are slow: Cortex-A53, A72 (Raspberry Pi 3, 4)",
            layer=replace(Projections.all(_FOUR), gates=Float32()),
            table=_TABLE,
            head=_TWO_STAGE,
            measured={_NEAREST: Measured(kl=0.0518, top1=0.881, perplexity_change=0.082, megabytes=349)},
        ),
        Recipe(
            "quality",
            purpose="nearly the original, reads twice as much per token as fast",
            layer=Projections.all(Blockwise(bits=8, block=32, symmetric=True)),
            table=Blockwise(bits=8, block=128, symmetric=True),
            measured={_NEAREST: Measured(kl=0.0012, top1=0.981, perplexity_change=-0.003, megabytes=519)},
        ),
        Recipe(
            "int8",
            purpose="8 bits in large blocks: less to read than quality",
            layer=Projections.all(Blockwise(bits=8, block=128)),
            table=_TABLE,
            head=_TWO_STAGE,
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
