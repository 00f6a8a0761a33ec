"""The whole export stage on one page: read -> check -> build and quantize -> verify -> write -> publish.

The bundle is put together in a hidden folder beside its destination and renamed at the very end, so that an export that
fails, or is killed, leaves nothing behind that looks like a bundle.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tokenizers import Tokenizer

from edge.bundle import (
    GRAPH,
    TOKENIZER,
    WEIGHTS,
    CacheType,
    FileEntry,
    Manifest,
    Source,
    Target,
    hash_file,
    publish_bundle,
)
from edge.errors import ExportError
from edge.signing import PrivateKey
from export.architectures import architecture_for
from export.build import Graph, build_graph, token_ids
from export.calibration import BUILT_IN, CalibrationText
from export.checkpoint import Checkpoint
from export.kv_scales import cache_test, calibrate, quantize_cache
from export.lora import copy_adapters
from export.manifest import describe_recipe, facts, model_name, write_text_side
from export.mtp import MtpGraph, build_mtp, multi_token_prediction, share_right, skipped_mtp
from export.progress import Progress, step
from export.quantize.recipes import Recipe, recipe_named
from export.report import Quality, Row, Windows, built_in_windows, check_folder, compare, describe, new_report
from export.report_page import write_report
from export.staging import disk_errors, staging_folder
from export.targets import check_range, check_target, recipe_for, retarget
from export.verify import check_kernels, mtp_self_test, self_test

SELF_TEST_PROMPT = "The capital of France is"


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
    mtp: bool = False,
) -> Report:
    """Turn a checkpoint into a verified bundle at ``destination``.

    Args:
        checkpoint: the open source.
        destination: the bundle's folder; must not exist, or be empty (as it stays if the export fails).
        recipe: number formats; a GPU's table has 8 bits where others have 6.
        progress: receives the phases.
        name: the model name requests will use; None = made from the source's.
        context: tokens of context; None = the checkpoint's, at most :data:`export.build.DEFAULT_CONTEXT`.
        kv: number format of the cache; ``target`` cuda takes float16.
        target: what the graph is made for; it is verified on a processor before it is made for a GPU.
        calibration: what the rounding of the weights is fitted to; None = each weight to nearest.
        adapters: folders of LoRA adapters as PEFT saves them, by the names that requests will use.
        licence: SPDX id or name, where known.
        counter: devices that have served a bundle of this name with a higher one refuse this one.
        key: signs the manifest; None = nobody does.
        oracle: what :func:`export.oracle.verify_against` measured, for the manifest.
        report: folder of a report that gets a row for what the recipe costs; None = it is not measured.
        mtp: whether the checkpoint's head of multi-token prediction becomes a second graph.

    Raises:
        CheckpointError: the checkpoint is damaged or does not match its config.
        AdapterError: an adapter is damaged, of an unsupported kind, or made for another model.
        ConfigError: name, context, target or destination cannot be used, or there is no head to keep.
        ExportError: a verification failed, or the disk refused.
    """
    clock = _Clock()
    served_as = model_name(name, checkpoint.origin.location)
    architecture = architecture_for(checkpoint.config)
    states = architecture.state_layout() is not None
    check_target(target, kv=kv, adapters=bool(adapters), states=states)
    recipe = recipe_for(target, recipe)
    predictor = multi_token_prediction(checkpoint) if mtp else None
    known = None if report is None else check_folder(report, new_report(checkpoint, served_as))
    with staging_folder(destination) as staging, disk_errors():
        # Before the long work: they may turn out to be of another model.
        entries = copy_adapters(adapters or {}, architecture, staging)
        with clock.phase("quantize"):
            graph = build_graph(
                checkpoint, staging, recipe, progress=progress, context=context, lora=bool(entries),
                calibration=calibration,
            )  # fmt: skip
            head = None
            if predictor is not None:
                head = build_mtp(predictor, graph, checkpoint, staging, progress=progress)
            write_text_side(checkpoint, staging)
        measured: dict[str, Any] = {}
        if kv == "int8":
            with clock.phase("calibrate"):
                graph, measured["kv"] = _with_int8_cache(graph, checkpoint, staging, progress)
        with clock.phase("verify"):
            measured |= _verify(graph, head, checkpoint, staging, progress)
        if known is not None:
            with clock.phase("report"):
                windows = built_in_windows(Tokenizer.from_file(str(staging / TOKENIZER)), graph.context_length)
                row = _row(recipe, calibration, graph, staging, _quality(graph, checkpoint, staging, windows, progress))
                known, measured["quality"] = known.with_row(row), describe(row.quality)
                if head is not None:
                    measured["mtp"]["top1"] = share_right(head.model, graph.model, staging, windows)
        if target != "cpu":
            with clock.phase("target"):
                ids = measured["self_test"]["prompt_ids"]
                graph, measured["target"] = _for_gpu(graph, staging, target, ids, progress)
        with clock.phase("hash"):
            if oracle is not None:
                measured["oracle"] = oracle
            source, files = _hash(checkpoint, staging, progress)
            manifest = Manifest(
                name=served_as,
                target=target,
                recipe=describe_recipe(calibration, graph, head),
                source=source,
                files=files,
                adapters=entries,
                measured=measured,
                licence=licence,
                counter=counter,
                **facts(graph, checkpoint),
            )
            _publish(staging, destination.resolve(), manifest, key)
        if report is not None and known is not None:
            write_report(report, known)
    return Report(destination, manifest, clock.seconds, _notes(checkpoint, graph, head))


def _notes(checkpoint: Checkpoint, graph: Graph, head: MtpGraph | None) -> tuple[str, ...]:
    """What the user should know, one sentence each."""
    skipped = skipped_mtp(checkpoint) if head is None else []
    return (*checkpoint.notes, *skipped, *([graph.kept.note()] if graph.kept else []))


def _with_int8_cache(
    graph: Graph, checkpoint: Checkpoint, staging: Path, progress: Progress
) -> tuple[Graph, dict[str, Any]]:
    """The graph with an int8 cache, saved in place of the one without, and what that costs."""
    ids = token_ids(checkpoint, CalibrationText.open(BUILT_IN))
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


def _verify(
    graph: Graph, head: MtpGraph | None, checkpoint: Checkpoint, staging: Path, progress: Progress
) -> dict[str, Any]:
    """What was measured, by the names in the manifest."""
    if checkpoint.vocab_ids() > graph.architecture.padded_vocab_size:
        raise ExportError("the tokenizer has more ids than the model", hint="do tokenizer and weights belong together?")
    tokenizer = Tokenizer.from_file(str(staging / TOKENIZER))
    prompt_ids = tokenizer.encode(SELF_TEST_PROMPT, add_special_tokens=False).ids
    with step(progress, "verifying the bundle", None):
        difference = check_kernels(graph.model)
        tested = self_test(graph.model, staging, prompt_ids)
        text = {"prompt": SELF_TEST_PROMPT, "next_text": tokenizer.decode([tested.next_id])}
        measured = {"self_test": {"kernel_difference": difference, **text, **asdict(tested)}}
        if head is not None:
            difference = check_kernels(head.model)
            drafted = mtp_self_test(head.model, graph.model, staging, tested)
            text = {"next_text": tokenizer.decode([drafted.next_id])}
            measured["mtp"] = {"kernel_difference": difference, **text, **asdict(drafted)}
    return measured


def _quality(graph: Graph, checkpoint: Checkpoint, staging: Path, windows: Windows, progress: Progress) -> Quality:
    """What the graph costs against the checkpoint in float32, which lies beside the bundle meanwhile."""
    with tempfile.TemporaryDirectory(prefix=".reference.", dir=staging.parent) as name:
        folder = Path(name)
        reference = build_graph(checkpoint, folder, recipe_named("fp32"), progress=progress)
        with step(progress, "measuring what the recipe costs", None):
            return compare(windows.logits(reference.model, folder), windows.logits(graph.model, staging), windows)


def _row(recipe: Recipe, calibration: CalibrationText | None, graph: Graph, staging: Path, quality: Quality) -> Row:
    return Row(
        recipe=recipe.name,
        calibrated=calibration is not None,
        kv=graph.kv.dtype,
        weight_bytes=(staging / WEIGHTS).stat().st_size,
        weight_bytes_per_token=graph.weight_bytes_per_token,
        quality=quality,
    )


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


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)
