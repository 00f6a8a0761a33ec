"""The whole export stage on one page: read -> check -> build and quantize -> verify -> write -> publish.

The bundle is put together in a hidden folder beside its destination and renamed at the very end, so that an export that
fails, or is killed, leaves nothing behind that looks like a bundle.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tokenizers import Tokenizer

from edge.bundle import (
    CHAT_TEMPLATE,
    GENERATION,
    GRAPH,
    SCHEMA_VERSION,
    TOKENIZER,
    WEIGHTS,
    CacheType,
    FileEntry,
    KVLayout,
    Manifest,
    Source,
    Target,
    hash_file,
    publish_bundle,
)
from edge.errors import ConfigError, ExportError
from edge.signing import PrivateKey
from export.architectures import architecture_for
from export.architectures.decoder import Decoder
from export.calibration import BUILT_IN, Calibration, CalibrationText
from export.checkpoint import Checkpoint
from export.graph import GraphBuilder
from export.kv_scales import cache_test, calibrate, quantize_cache
from export.lora import LoraPlaces, copy_adapters
from export.progress import Progress, step
from export.quantize.recipes import Float32, Recipe, recipe_named, row_multiple
from export.report import Quality, Row, built_in_windows, check_folder, compare, describe, new_report
from export.report_page import write_report
from export.targets import check_range, check_target, retarget
from export.verify import check_kernels, self_test
from export.weights import DataFile, Weights

MIN_RUNTIME_VERSION = "0.1.0"
DEFAULT_CONTEXT = 32768
"""Tokens; rotary tables for more cost 8 MB each 32k and no small device has the cache for it."""
TOOLS = ("qwedge", "gguf", "numpy", "onnx-ir", "onnxruntime", "tokenizers")
"""What the bytes of a bundle depend on besides source, recipe and options; the manifest names their versions."""
SELF_TEST_PROMPT = "The capital of France is"
_NAME = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True)
class Kept:
    """Matrices of the layers, which a quantized checkpoint has as integers."""

    method: str
    matrices: int
    """Kept as stored."""
    requantized: int
    """Of a kind that kernels do not take: their values were quantized by the recipe."""

    def note(self) -> str:
        """What the user should know about it."""
        if not self.matrices + self.requantized:
            return f"the weights are floats of {self.method}: all follow the recipe"
        others = f"; {self.requantized} that no kernel takes follow the recipe" if self.requantized else ""
        return (
            f"{self.matrices} matrices of the layers keep the integers of {self.method}, "
            f"embedding and head follow the recipe{others}"
        )


@dataclass(frozen=True)
class Graph:
    """A graph that was built, with its data file beside it."""

    model: ir.Model
    architecture: Decoder
    context_length: int
    """Tokens it has rotary tables for."""
    kv: KVLayout
    parameter_count: int
    weight_bytes_per_token: int
    row_multiple: int
    kept: Kept | None
    """What was kept of a checkpoint that is quantized already."""


@dataclass(frozen=True)
class Report:
    """What an export did."""

    folder: Path
    manifest: Manifest
    seconds: dict[str, float]
    """By phase."""
    notes: tuple[str, ...]


def export_bundle(
    checkpoint: Checkpoint,
    destination: Path,
    recipe: Recipe,
    *,
    progress: Progress,
    name: str | None = None,
    context: int | None = None,
    kv: CacheType = "float32",
    target: Target = "cpu",
    calibration: CalibrationText | None = None,
    adapters: Mapping[str, Path] | None = None,
    licence: str | None = None,
    counter: int = 0,
    key: PrivateKey | None = None,
    oracle: dict[str, Any] | None = None,
    report: Path | None = None,
) -> Report:
    """Turn a checkpoint into a verified bundle at ``destination``.

    Args:
        checkpoint: the open source.
        destination: the bundle's folder; must not exist, or be empty (as it stays if the export fails).
        recipe: number formats.
        progress: receives the phases.
        name: the model name requests will use; None = made from the source's.
        context: tokens of context; None = the checkpoint's, at most :data:`DEFAULT_CONTEXT`.
        kv: number format of the cache; ``target`` cuda takes float16.
        target: what the graph is made for; it is verified on a processor before it is made for a GPU.
        calibration: what the rounding of the weights is fitted to; None = each weight to nearest.
        adapters: folders of LoRA adapters as PEFT saves them, by the names that requests will use.
        licence: SPDX id or name, where known.
        counter: devices that have served a bundle of this name with a higher one refuse this one.
        key: signs the manifest; None = nobody does.
        oracle: what :func:`export.oracle.verify_against` measured, for the manifest.
        report: folder of a report that gets a row for what the recipe costs; None = it is not measured.

    Raises:
        CheckpointError: the checkpoint is damaged or does not match its config.
        AdapterError: an adapter is damaged, of an unsupported kind, or made for another model.
        ConfigError: name, context, target or destination cannot be used.
        ExportError: a verification failed, or the disk refused.
    """
    clock = _Clock()
    model_name = _model_name(name, checkpoint.origin.location)
    architecture = architecture_for(checkpoint.config)
    states = architecture.state_layout() is not None
    check_target(target, kv=kv, adapters=bool(adapters), states=states)
    known = None if report is None else check_folder(report, new_report(checkpoint, model_name))
    with _staging(destination) as staging, disk_errors():
        # Before the long work: they may turn out to be of another model.
        entries = copy_adapters(adapters or {}, architecture, staging)
        with clock.phase("quantize"):
            graph = build_graph(
                checkpoint, staging, recipe, progress=progress, context=context, lora=bool(entries),
                calibration=calibration,
            )  # fmt: skip
            _write_text(checkpoint, staging)
        measured: dict[str, Any] = {}
        if kv == "int8":
            with clock.phase("calibrate"):
                graph, measured["kv"] = _with_int8_cache(graph, checkpoint, staging, progress)
        with clock.phase("verify"):
            measured["self_test"] = _verify(graph, checkpoint, staging, progress)
        if known is not None:
            with clock.phase("report"):
                row = _row(recipe, calibration, graph, staging, _quality(graph, checkpoint, staging, progress))
                known, measured["quality"] = known.with_row(row), describe(row.quality)
        if target != "cpu":
            with clock.phase("target"):
                ids = measured["self_test"]["prompt_ids"]
                graph, measured["target"] = _for_gpu(graph, staging, target, ids, progress)
        with clock.phase("hash"):
            if oracle is not None:
                measured["oracle"] = oracle
            source, files = _hash(checkpoint, staging, progress)
            manifest = Manifest(
                name=model_name,
                target=target,
                recipe=_recipe(recipe, calibration, graph),
                row_multiple=graph.row_multiple,
                source=source,
                files=files,
                adapters=entries,
                measured=measured,
                licence=licence,
                counter=counter,
                tools={name: version(name) for name in TOOLS},
                **_facts(graph, checkpoint),
            )
            _publish(staging, destination.resolve(), manifest, key)
        if report is not None and known is not None:
            write_report(report, known)
    notes = (*checkpoint.notes, graph.kept.note()) if graph.kept else checkpoint.notes
    return Report(destination, manifest, clock.seconds, notes)


def build_graph(
    checkpoint: Checkpoint,
    folder: Path,
    recipe: Recipe,
    *,
    progress: Progress,
    context: int | None = None,
    lora: bool = False,
    calibration: CalibrationText | None = None,
) -> Graph:
    """Check the checkpoint, stream its weights into ``folder`` and save the graph there.

    Args:
        checkpoint: the open source.
        folder: where graph and weights go.
        recipe: number formats.
        progress: receives the one phase.
        context: tokens of context; None = the checkpoint's, at most :data:`DEFAULT_CONTEXT`.
        lora: whether the graph gets places for LoRA adapters.
        calibration: what the rounding of the weights is fitted to; None = each weight to nearest.

    Raises:
        CheckpointError: tensors are missing, left over, misshapen or unreadable; the config is unsupported.
        ConfigError: ``context`` is out of range.
        OSError: the disk refused; see :func:`disk_errors`.
    """
    architecture = architecture_for(checkpoint.config)
    architecture.check({name: info.shape for name, info in checkpoint.tensors.items()})
    length = _context(context, architecture)
    with (
        step(progress, f"{recipe.name} weights", architecture.parameter_count()) as advance,
        DataFile(folder) as file,
    ):
        weights = Weights(checkpoint, recipe, file, advance)
        observe = Calibration(folder, _tokens(checkpoint, calibration), length).observe if calibration else None
        builder = GraphBuilder(weights, LoraPlaces().adapt if lora else None, observe)
        bytes_per_token = architecture.build(builder, length)
        model = builder.model(architecture.model_type)
    assert weights.parameter_count == architecture.parameter_count()
    ir.save(model, folder / GRAPH)
    kept = None
    if checkpoint.quantized and not isinstance(recipe.layer.qkv, Float32):
        kept = Kept(checkpoint.quantized, len(weights.kept), len(weights.requantized))
    return Graph(
        model=model,
        architecture=architecture,
        context_length=length,
        kv=architecture.kv_layout(),
        parameter_count=weights.parameter_count,
        weight_bytes_per_token=bytes_per_token,
        row_multiple=max(recipe.row_multiple, row_multiple(weights.kept.values())),
        kept=kept,
    )


def _with_int8_cache(
    graph: Graph, checkpoint: Checkpoint, staging: Path, progress: Progress
) -> tuple[Graph, dict[str, Any]]:
    """The graph with an int8 cache, saved in place of the one without, and what that costs."""
    ids = _tokens(checkpoint, CalibrationText.open(BUILT_IN))
    with step(progress, "calibrating the cache", None):
        calibration = calibrate(graph.model, staging, ids)
        quantize_cache(graph.model, calibration.scales)
        tested = cache_test(graph.model, staging, ids, calibration)
    ir.save(graph.model, staging / GRAPH)
    return replace(graph, kv=graph.kv.model_copy(update={"dtype": "int8"})), asdict(tested)


def _for_gpu(
    graph: Graph, staging: Path, target: Target, prompt_ids: Sequence[int], progress: Progress
) -> tuple[Graph, dict[str, Any]]:
    """The graph for a GPU, saved in place of the one for processors, and what was measured for it."""
    with step(progress, f"graph for {target}", None):
        measured = check_range(graph.model, staging, target, prompt_ids)
        kv = retarget(graph.model, staging, target, graph.kv)
    return replace(graph, kv=kv), measured


def _tokens(checkpoint: Checkpoint, calibration: CalibrationText) -> list[int]:
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json().decode())
    ids: list[int] = tokenizer.encode(calibration.text, add_special_tokens=False).ids
    return ids


def _verify(graph: Graph, checkpoint: Checkpoint, staging: Path, progress: Progress) -> dict[str, Any]:
    if checkpoint.vocab_ids() > graph.architecture.padded_vocab_size:
        raise ExportError("the tokenizer has more ids than the model", hint="do tokenizer and weights belong together?")
    tokenizer = Tokenizer.from_file(str(staging / TOKENIZER))
    prompt_ids = tokenizer.encode(SELF_TEST_PROMPT, add_special_tokens=False).ids
    with step(progress, "verifying the bundle", None):
        difference = check_kernels(graph.model)
        tested = self_test(graph.model, staging, prompt_ids)
    text = {"prompt": SELF_TEST_PROMPT, "next_text": tokenizer.decode([tested.next_id])}
    return {"kernel_difference": difference, **text, **asdict(tested)}


def _quality(graph: Graph, checkpoint: Checkpoint, staging: Path, progress: Progress) -> Quality:
    """What the graph costs against the checkpoint in float32, which lies beside the bundle meanwhile."""
    windows = built_in_windows(Tokenizer.from_file(str(staging / TOKENIZER)), graph.context_length)
    with tempfile.TemporaryDirectory(prefix=".reference.", dir=staging.parent) as name:
        folder = Path(name)
        reference = build_graph(checkpoint, folder, recipe_named("fp32"), progress=progress)
        with step(progress, "measuring what the recipe costs", None):
            return compare(windows.logits(reference.model, folder), windows.logits(graph.model, staging), windows)


def _recipe(recipe: Recipe, calibration: CalibrationText | None, graph: Graph) -> dict[str, Any]:
    """How the weights were quantized, for the manifest."""
    kept = {"as_stored": asdict(graph.kept)} if graph.kept else {}
    return recipe.describe() | {"calibration": calibration.describe() if calibration else None} | kept


def _row(recipe: Recipe, calibration: CalibrationText | None, graph: Graph, staging: Path, quality: Quality) -> Row:
    return Row(
        recipe=recipe.name,
        calibrated=calibration is not None,
        kv=graph.kv.dtype,
        weight_bytes=(staging / WEIGHTS).stat().st_size,
        weight_bytes_per_token=graph.weight_bytes_per_token,
        quality=quality,
    )


def _write_text(checkpoint: Checkpoint, staging: Path) -> None:
    (staging / TOKENIZER).write_bytes(checkpoint.tokenizer_json())
    if template := checkpoint.chat_template():
        (staging / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    generation = json.dumps(asdict(checkpoint.generation), indent=2)
    (staging / GENERATION).write_text(generation + "\n", encoding="utf-8")


def _facts(graph: Graph, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifest says of the graph and its format."""
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
    }


def _hash(checkpoint: Checkpoint, staging: Path, progress: Progress) -> tuple[Source, list[FileEntry]]:
    """Where the weights came from, and the bundle's files, all with their SHA-256."""
    paths = sorted(staging.iterdir())
    total = checkpoint.num_file_bytes + sum(path.stat().st_size for path in paths)
    with step(progress, "hashing", total) as advance:
        return checkpoint.hash_files(advance), [hash_file(path, progress=advance) for path in paths]


def _publish(staging: Path, destination: Path, manifest: Manifest, key: PrivateKey | None) -> None:
    if destination.exists():
        # It was empty at the start; if it is not any more, this refuses.
        destination.rmdir()
    publish_bundle(staging, destination, manifest, key=key)


def _context(wanted: int | None, architecture: Decoder) -> int:
    most = architecture.max_positions
    if wanted is None:
        return min(most, DEFAULT_CONTEXT)
    if not 0 < wanted <= most:
        raise ConfigError(f"--context {wanted} is out of range", hint=f"this model has 1 to {most} positions")
    return wanted


def _model_name(given: str | None, location: str) -> str:
    if given is None:
        stem = location.rpartition("/")[2].removesuffix(".gguf")
        given = _NAME.sub("-", stem.lower()).strip("-._")[:80] or "model"
    if _NAME.search(given) or not given[:1].isalnum() or len(given) > 96:
        hint = "use lower-case letters, digits, dots and dashes"
        raise ConfigError(f"{given!r} cannot be a model name", hint=hint, param="name")
    return given


@contextmanager
def _staging(destination: Path) -> Iterator[Path]:
    """A hidden folder beside ``destination`` that is gone afterwards, whatever happens."""
    place = destination.resolve()
    try:
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            hint = "choose another folder, or remove it first"
            raise ConfigError(f"{destination} exists already", hint=hint, param="output")
        place.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=place.parent))
    except OSError as error:
        hint = "choose a folder you may write to"
        raise ConfigError(f"cannot write to {place.parent}: {error.strerror}", hint=hint, param="output") from None
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Translate a full disk into an error with a hint, wherever it shows."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(f"cannot write the model: {reason}", hint="is there enough disk space?") from None


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)
