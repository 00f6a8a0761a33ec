"""What a bundle says of itself: its name, the facts of its manifest, and its text side."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from edge.bundle import CHAT_TEMPLATE, GENERATION, SCHEMA_VERSION, TOKENIZER
from edge.errors import ConfigError
from export.build import Graph
from export.calibration import CalibrationText
from export.checkpoint import Checkpoint
from export.mtp import MtpGraph

MIN_RUNTIME_VERSION: Final = "0.1.0"
TOOLS: Final = ("qwedge", "gguf", "numpy", "onnx-ir", "onnxruntime", "tokenizers")
"""What the bytes of a bundle depend on besides source, recipe and options; the manifest names their versions."""
_NAME = re.compile(r"[^a-z0-9._-]+")


def model_name(given: str | None, location: str) -> str:
    """The name requests will use: the one given, or one made from the source's.

    Raises:
        ConfigError: no request could use it.
    """
    if given is None:
        stem = location.rpartition("/")[2].removesuffix(".gguf")
        given = _NAME.sub("-", stem.lower()).strip("-._")[:80] or "model"
    if _NAME.search(given) or not given[:1].isalnum() or len(given) > 96:
        hint = "use lower-case letters, digits, dots and dashes"
        raise ConfigError(f"{given!r} cannot be a model name", hint=hint, param="name")
    return given


def write_text_side(checkpoint: Checkpoint, folder: Path) -> None:
    """Write tokenizer, chat template and sampling defaults.

    Raises:
        OSError: the disk refused.
    """
    (folder / TOKENIZER).write_bytes(checkpoint.tokenizer_json())
    if template := checkpoint.chat_template():
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    generation = json.dumps(asdict(checkpoint.generation), indent=2)
    (folder / GENERATION).write_text(generation + "\n", encoding="utf-8")


def describe_recipe(calibration: CalibrationText | None, graph: Graph, head: MtpGraph | None) -> dict[str, Any]:
    """How the weights were quantized, and what was made of the checkpoint besides the model itself."""
    beside: dict[str, Any] = {"calibration": calibration.describe() if calibration else None}
    if graph.kept:
        beside["as_stored"] = asdict(graph.kept)
    if head is not None:
        # Here, because runtimes that know no such head refuse unknown fields of the manifest itself.
        beside["mtp"] = head.describe()
    return graph.recipe.describe() | beside


def facts(graph: Graph, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifest says of the graph, its format and its makers' versions."""
    return {
        "schema_version": SCHEMA_VERSION,
        "version": "1",
        "min_runtime_version": MIN_RUNTIME_VERSION,
        "model_type": graph.architecture.model_type,
        "parameter_count": graph.parameter_count,
        "context_length": graph.context_length,
        "vocab_size": checkpoint.vocab_ids(),
        "padded_vocab_size": graph.architecture.padded_vocab_size,
        "hidden_size": graph.architecture.hidden_size,
        "kv": graph.kv,
        "state": graph.architecture.state_layout(),
        "weight_bytes_per_token": graph.weight_bytes_per_token,
        "row_multiple": graph.row_multiple,
        "tools": {name: version(name) for name in TOOLS},
    }
