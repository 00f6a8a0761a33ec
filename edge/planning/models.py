"""The shapes of known models, in any recipe, without a bundle."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge.bundle import KVLayout, StateLayout
from edge.errors import ConfigError
from edge.planning.shape import Format, Product, Shape

Positive = Annotated[int, Field(gt=0)]
DEFAULT_RECIPE = "balanced"
NARROW = 1024
"""Channels of hidden states below which some recipes have other formats, as in the export."""
_FLOAT_BYTES, _SCALE_BYTES = 4, {"float16": 2, "float32": 4}
_COARSE_BITS = 4
"""The upper ones of a table's codes."""
_TEXT_BYTES = 5 << 20
"""Tokenizer and what else is no weight."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearAttention(_Model):
    """The layers of linear attention of a model."""

    layers: Positive
    key_heads: Positive
    value_heads: Positive
    key_dim: Positive
    value_dim: Positive
    conv_width: Positive

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.values_size

    @property
    def values_size(self) -> int:
        """Width of all values."""
        return self.value_heads * self.value_dim

    def layout(self) -> StateLayout:
        """What it remembers of a sequence."""
        return StateLayout(
            layers=self.layers,
            conv_channels=self.channels,
            conv_kernel=self.conv_width - 1,
            value_heads=self.value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
        )


class KnownModel(_Model):
    """One model of ``models.toml``."""

    also: tuple[str, ...] = ()
    """Other names of models of this shape."""
    hidden_size: Positive
    intermediate_size: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    vocab: Positive
    """Rows of the table."""
    tied: bool
    """Whether embedding and head are one table."""
    context: Positive
    linear: LinearAttention | None = None

    @property
    def full_layers(self) -> int:
        """Those of full attention."""
        return self.layers - (self.linear.layers if self.linear else 0)

    def matrices(self, layer: KnownLayer) -> dict[str, list[tuple[int, int, int]]]:
        """Rows, columns and number of the matrices of all layers, by the names of their formats in ``layer``."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        gated = 2 if self.linear else 1  # the models with linear attention gate the full one
        split = layer.query_key is not None or layer.value is not None
        outer = 2 * (self.layers // 4) if layer.outer_down else 0
        found: dict[str, list[tuple[int, int, int]]] = {
            "qkv": [] if split else [(gated * queries + 2 * keys, hidden, self.full_layers)],
            "out": [(hidden, queries, self.full_layers)],
            "gate_up": [(2 * inner, hidden, self.layers)],
            "down": [(hidden, inner, self.layers - outer)],
            "outer_down": [(hidden, inner, outer)] if outer else [],
            "query_key": [],
            "value": [],
        }
        if linear := self.linear:
            found["qkv"].append((linear.channels + linear.values_size, hidden, linear.layers))
            found["out"].append((hidden, linear.values_size, linear.layers))
            found["gates"] = [(2 * linear.value_heads, hidden, linear.layers)]
        if split:
            found["query_key" if layer.query_key else "qkv"].append((gated * queries + keys, hidden, self.full_layers))
            found["value" if layer.value else "qkv"].append((keys, hidden, self.full_layers))
        return found


class Part(_Model):
    """The format of one class of matrices."""

    bits: Positive
    block: Positive = 1
    symmetric: bool = False
    """Whether no zero points are stored."""

    def form(self) -> Format:
        """The same for computing with."""
        return Format(self.bits, self.block)


_CORRECTION = Part(bits=_COARSE_BITS, block=32, symmetric=True)


class KnownLayer(_Model):
    """The formats of a layer's matrices."""

    qkv: Part
    query_key: Part | None = None
    """Of queries and keys of full attention, where theirs is another."""
    value: Part | None = None
    """Of its values, where theirs is another."""
    out: Part
    gate_up: Part
    down: Part
    outer_down: Part | None = None
    """Of the first and the last quarter of the layers, where theirs is another."""
    gates: Part


class KnownRecipe(_Model):
    """One recipe of ``recipes.toml``."""

    layer: KnownLayer
    narrow: KnownLayer | None = None
    """In models narrower than :data:`NARROW`, where theirs is another."""
    table: Part
    candidates: int = 0
    """Rows of the table with exact logits, where the head reads the upper bits of its codes first."""
    corrected: int = 0
    """Columns of the table for which those bits are corrected."""
    scales: Literal["float16", "float32"]
    """How they are stored; in memory they are float32."""

    def layer_of(self, model: KnownModel) -> KnownLayer:
        """The formats of a model's layers."""
        return (self.narrow if model.hidden_size < NARROW else None) or self.layer


@cache
def known_models() -> Mapping[str, KnownModel]:
    """The models by name, the smallest of a family first."""
    return {name: KnownModel.model_validate(entry) for name, entry in _read("models.toml").items()}


@cache
def known_recipes() -> Mapping[str, KnownRecipe]:
    """The recipes by name."""
    return {name: KnownRecipe.model_validate(entry) for name, entry in _read("recipes.toml").items()}


def is_known(name: str) -> bool:
    """Whether :func:`shape_of` knows a model of that name."""
    return _find(name) is not None


def shape_of(name: str, recipe: str = DEFAULT_RECIPE) -> Shape:
    """A known model in a recipe.

    Raises:
        ConfigError: there is no such model, or no such recipe.
    """
    model, recipes = _find(name), known_recipes()
    if model is None:
        hint = f"a bundle's folder, an installed bundle, or one of {', '.join(known_models())}"
        raise ConfigError(f"there is no model {name!r}", hint=hint)
    if recipe not in recipes:
        raise ConfigError(f"there is no recipe {recipe!r}", hint=f"recipes: {', '.join(recipes)}")
    return _shape(name, model, recipe, recipes[recipe])


def _find(name: str) -> KnownModel | None:
    return next((model for key, model in known_models().items() if name == key or name in model.also), None)


def _shape(name: str, model: KnownModel, recipe_name: str, recipe: KnownRecipe) -> Shape:
    formats = recipe.layer_of(model)
    layers = [
        (getattr(formats, part), _product(rows, columns, getattr(formats, part).form(), count))
        for part, matrices in model.matrices(formats).items()
        for rows, columns, count in matrices
    ]
    table = _product(model.vocab, model.hidden_size, recipe.table.form())
    head = replace(table, form=replace(table.form, bits=_COARSE_BITS)) if recipe.candidates else table
    parts = [*layers, *[(recipe.table, table)] * (1 if model.tied else 2)]
    correction = None
    if recipe.candidates:
        correction = _product(model.vocab, recipe.corrected, _CORRECTION.form())
        parts.append((_CORRECTION, correction))
    converted = 0 if recipe.scales == "float32" else _FLOAT_BYTES
    return Shape(
        name=name,
        recipe=recipe_name,
        layers=tuple(product for _, product in layers),
        head=head,
        correction=correction,
        table=table,
        candidates=recipe.candidates,
        num_layers=model.layers,
        num_heads=model.heads,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab,
        context_length=model.context,
        kv=KVLayout(layers=model.full_layers, kv_heads=model.kv_heads, head_dim=model.head_dim),
        state=model.linear.layout() if model.linear else None,
        converted_bytes=converted * sum(product.num_blocks for _, product in parts),
        disk_bytes=_TEXT_BYTES + sum(_disk_bytes(part, product, recipe.scales) for part, product in parts),
    )


def _product(rows: int, columns: int, form: Format, count: int = 1) -> Product:
    return Product(rows, columns, form.fit(columns), count)


def _disk_bytes(part: Part, product: Product, scales: str) -> int:
    """Codes, scales and zero points."""
    form = product.form
    if form.is_float:
        return product.num_weights * _FLOAT_BYTES
    blocks = -(-product.columns // form.block)
    zero_points = 0 if part.symmetric else math.ceil(blocks * form.bits / 8)
    row = blocks * form.block * form.bits / 8 + blocks * _SCALE_BYTES[scales] + zero_points
    return product.count * product.rows * math.ceil(row)


def _read(name: str) -> Mapping[str, object]:
    return tomllib.loads(files("edge.planning").joinpath(name).read_text(encoding="utf-8"))
