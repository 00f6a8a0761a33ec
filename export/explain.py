"""``qwedge export --explain``: what each recipe does to which tensors, and what that costs."""

from __future__ import annotations

import json
from dataclasses import asdict

from export.quantize.recipes import MEASURED_ON, RECIPES, Blockwise, Format, Measured, Recipe

_LABELS = {
    "qkv": "query, key, value",
    "out": "attention output",
    "gate_up": "gate and up",
    "down": "down",
    "gates": "decay and update",
    "value": "value alone",
    "calibrated_down": "some down, calibrated",
}

_AS_STORED = "Where a checkpoint is quantized already, layers keep its integers; only fp32 makes floats of them."

_MTP = (
    "The head of multi-token prediction (--mtp) has a layer's formats, its fc that of the attention output, to nearest."
)


def recipes_as_text() -> str:
    """All recipes, for people."""
    parts = []
    for recipe in RECIPES.values():
        lines = [f"  {label:<21} {text}" for label, text in _lines(recipe)]
        parts.append("\n".join([f"{recipe.name}: {recipe.purpose}", *lines]))
    return "\n\n".join([*parts, _AS_STORED, _MTP, f"Measured with {MEASURED_ON}."])


def recipes_as_json() -> str:
    """All recipes, as a list of objects."""
    return json.dumps([_as_object(recipe) for recipe in RECIPES.values()], indent=2)


def _lines(recipe: Recipe) -> list[tuple[str, str]]:
    layer = {_LABELS[name]: _format(form) for name, form in recipe.layer_formats().items()}
    lines = [*layer.items(), ("embedding and head", _format(recipe.table)), ("logits", _logits(recipe))]
    for rounding, measured in recipe.measured.items():
        lines.append((rounding, _measured(measured)))
    return lines


def _format(form: Format) -> str:
    if not isinstance(form, Blockwise):
        return "float32"
    return f"{form.bits} bits, {'symmetric' if form.symmetric else 'asymmetric'}, blocks of {form.block}"


def _logits(recipe: Recipe) -> str:
    if recipe.head is None:
        return "from that table"
    channels = f"corrected for {recipe.head.corrected} channels"
    return f"{recipe.head.candidates} candidates by the upper 4 bits of that table, {channels}; theirs by all 8"


def _measured(measured: Measured) -> str:
    return (
        f"divergence {measured.kl:.4f} nats, same first choice {measured.top1:.1%}, perplexity "
        f"{measured.perplexity_change:+.1%}, {measured.megabytes} MB"
    )


def _as_object(recipe: Recipe) -> dict[str, object]:
    measured = {rounding: asdict(each) for rounding, each in recipe.measured.items()}
    return recipe.describe() | {"purpose": recipe.purpose, "measured": measured}
