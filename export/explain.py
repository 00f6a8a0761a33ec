"""``qwedge export --explain``: what each recipe does to which tensors, and what that costs."""

from __future__ import annotations

import json
from dataclasses import asdict

from export.quantize.recipes import (
    COARSE_BITS,
    MEASURED_ON,
    NARROW,
    RECIPES,
    Blockwise,
    Format,
    Measured,
    Projections,
    Recipe,
)

_LABELS = {
    "qkv": "query, key, value",
    "out": "attention output",
    "gate_up": "gate and up",
    "down": "down",
    "gates": "decay and update",
    "query_key": "query and key alone",
    "value": "value alone",
    "outer_down": "down of outer layers",
}

_AS_STORED = "Where a checkpoint is quantized already, layers keep its integers; only fp32 makes floats of them."

_NARROW = f"Narrow models have hidden states of fewer than {NARROW:,} channels, as Qwen2.5-0.5B has."
_OUTER = "Outer layers are the first and the last quarter."
_MTP = (
    "The head of multi-token prediction (--mtp) has a layer's formats, its fc that of the attention output, to nearest."
)


def recipes_as_text() -> str:
    """All recipes, for people."""
    parts = []
    for recipe in RECIPES.values():
        lines = [f"  {label:<21} {text}" for label, text in _lines(recipe)]
        parts.append("\n".join([f"{recipe.name}: {recipe.purpose}", *lines]))
    return "\n\n".join([*parts, f"{_NARROW}\n{_OUTER}", _AS_STORED, _MTP, f"Measured with {MEASURED_ON}."])


def recipes_as_json() -> str:
    """All recipes, as a list of objects."""
    return json.dumps([_as_object(recipe) for recipe in RECIPES.values()], indent=2)


def _lines(recipe: Recipe) -> list[tuple[str, str]]:
    lines = [(_LABELS[name], _format(form)) for name, form in recipe.layer.formats().items()]
    if recipe.narrow is not None:
        lines += _changes("in narrow models", recipe.layer, recipe.narrow)
    if recipe.narrow_calibrated is not None:
        lines += _changes("  and calibrated", recipe.narrow or recipe.layer, recipe.narrow_calibrated)
    lines += [("embedding and head", _format(recipe.table)), ("logits", _logits(recipe))]
    for rounding, measured in recipe.measured.items():
        lines.append((rounding, _measured(measured)))
    return lines


def _changes(label: str, old: Projections, new: Projections) -> list[tuple[str, str]]:
    before, after = _in_full(old), _in_full(new)
    found = [f"{_LABELS[name]} {_format(after[name])}" for name in after if after[name] != before[name]]
    return [("" if number else label, text) for number, text in enumerate(found)]


def _in_full(layer: Projections) -> dict[str, Format]:
    return {"query_key": layer.qkv, "value": layer.qkv, "outer_down": layer.down} | layer.formats()


def _format(form: Format) -> str:
    if not isinstance(form, Blockwise):
        return "float32"
    return f"{form.bits} bits, {'symmetric' if form.symmetric else 'asymmetric'}, blocks of {form.block}"


def _logits(recipe: Recipe) -> str:
    if recipe.head is None:
        return "from that table"
    channels = f"corrected for {recipe.head.corrected} channels"
    coarse = f"by the upper {COARSE_BITS} bits of that table"
    return f"{recipe.head.candidates} candidates {coarse}, {channels}; theirs by all"


def _measured(measured: Measured) -> str:
    return (
        f"divergence {measured.kl:.4f} nats, same first choice {measured.top1:.1%}, perplexity "
        f"{measured.perplexity_change:+.1%}, {measured.megabytes} MB"
    )


def _as_object(recipe: Recipe) -> dict[str, object]:
    measured = {rounding: asdict(each) for rounding, each in recipe.measured.items()}
    narrow = {
        name: layer.describe()
        for name, layer in (("narrow", recipe.narrow), ("narrow_calibrated", recipe.narrow_calibrated))
        if layer is not None
    }
    return recipe.describe() | narrow | {"purpose": recipe.purpose, "measured": measured}
