"""``qwedge export``: from a checkpoint to a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from edge.bundle import Manifest, Target
from edge.errors import ConfigError
from export.explain import recipes_as_json, recipes_as_text
from export.progress import Progress
from export.quantize.recipes import DEFAULT, RECIPES, recipe_named

if TYPE_CHECKING:  # loaded when an export runs: every `qwedge --help` would wait seconds for them
    from export.catalog import CatalogEntry
    from export.pipeline import Report

RecipeName = Literal["balanced", "fast", "small", "nodot", "quality", "int8", "fp32"]
OracleName = Literal["transformers", "optimum"]
CacheName = Literal["float32", "int8"]
assert set(get_args(RecipeName)) == RECIPES.keys()


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    source: Annotated[
        str | None,
        typer.Argument(help="A catalog name, a Hugging Face folder, a GGUF file, or a hub id like Qwen/Qwen3-0.6B."),
    ] = None,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The bundle's folder; must not exist yet.")
    ] = None,
    recipe: Annotated[RecipeName, typer.Option(help="Number formats of the weights; see --explain.")] = DEFAULT,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Round the weights for this text, or built-in: better, takes minutes."),
    ] = None,
    kv: Annotated[CacheName, typer.Option(help="Number format of the cache; int8 takes a quarter.")] = "float32",
    target: Annotated[
        Target, typer.Option(help="What it runs on: processors, NVIDIA's GPUs, GPUs with Vulkan.")
    ] = "cpu",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR", help="A LoRA adapter as PEFT saves it; requests ask for MODEL:NAME. Repeatable."
        ),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Add a LoRA adapter as PEFT saves it to the weights for good. Repeatable."),
    ] = None,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Keep the head of multi-token prediction (Qwen3.5), as a second graph.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model name that requests use.  [default: from the source]")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", min=1, help="Longest context.  [default: the model's, at most 32768]"),
    ] = None,
    counter: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Devices that served a bundle of this name with a higher one refuse it."),
    ] = 0,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Sign it with this private key: NAME.key of `qwedge keys init`.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Measure what the recipe costs; write it to the manifest and a page in DIR."),
    ] = None,
    verify: Annotated[
        OracleName | None,
        typer.Option(help="Also compare the fp32 graph with this library; needs an environment with qwedge[optimum]."),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="Show the catalog and exit.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show what the recipes do and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert a checkpoint to a quantized ONNX bundle.

    The weights stream through in chunks, so little memory is needed. The last step verifies the bundle; an export that
    fails leaves nothing behind. Downloads are kept in QWEDGE_CACHE (default ~/.cache/qwedge).
    """
    if show_list:
        _print_catalog(as_json=as_json)
        return
    if explain:
        print(recipes_as_json() if as_json else recipes_as_text())
        return
    if source is None or output is None:
        raise ConfigError("SOURCE and --output are needed", hint="qwedge export --list shows the catalog")
    from export.console import console_progress

    with console_progress() as progress:
        exported, oracle = _export(
            source, output, recipe=recipe, kv=kv, target=target, calibrate=calibrate,
            adapters=_adapters(adapter or []), merge=merge or [], mtp=mtp, name=name, context=context,
            counter=counter, sign=sign, report=report, verify=verify, offline=offline, progress=progress,
        )  # fmt: skip
    _print_report(exported, oracle, as_json=as_json)


def _export(
    source: str,
    output: Path,
    *,
    recipe: str,
    kv: CacheName,
    target: Target,
    calibrate: str | None,
    adapters: dict[str, Path],
    merge: list[Path],
    mtp: bool,
    name: str | None,
    context: int | None,
    counter: int,
    sign: Path | None,
    report: Path | None,
    verify: OracleName | None,
    offline: bool,
    progress: Progress,
) -> tuple[Report, dict[str, Any] | None]:
    from edge.signing import PrivateKey
    from export.calibration import CalibrationText
    from export.merge import merge_adapters
    from export.oracle import Oracle, verify_against
    from export.pipeline import export_bundle
    from export.sources import default_cache, resolve

    # Read first: a wrong file name must not show after a download.
    key = PrivateKey.load(sign) if sign else None
    calibration = CalibrationText.open(calibrate) if calibrate else None
    resolved = resolve(source, cache=default_cache(), offline=offline, progress=progress)
    with resolved.open() as opened:
        checkpoint = merge_adapters(opened, merge) if merge else opened
        # The oracle comes first: a graph that is wrong must not become a bundle.
        oracle = verify_against(Oracle(verify), checkpoint, progress=progress) if verify else None
        licence = resolved.entry.licence if resolved.entry else None
        exported = export_bundle(
            checkpoint, output, recipe_named(recipe), progress=progress, name=name, context=context, kv=kv,
            target=target, calibration=calibration, adapters=adapters, licence=licence, counter=counter, key=key,
            oracle=oracle, report=report, mtp=mtp,
        )  # fmt: skip
    return exported, oracle


def _adapters(options: list[str]) -> dict[str, Path]:
    """``NAME=DIR`` of each adapter.

    Raises:
        ConfigError: one is written differently, or a name comes twice.
    """
    folders: dict[str, Path] = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals or name in folders:
            reason = "names an adapter twice" if equals else "lacks a name"
            raise ConfigError(f"--adapter {option} {reason}", hint="write --adapter NAME=DIR", param="adapter")
        folders[name] = Path(folder)
    return folders


def _print_report(report: Report, oracle: dict[str, Any] | None, *, as_json: bool) -> None:
    manifest = report.manifest
    size = sum(entry.size for entry in manifest.files)
    if as_json:
        result = {
            "folder": str(report.folder),
            "bytes": size,
            "seconds": report.seconds,
            "oracle": oracle,
            "notes": report.notes,
            "manifest": manifest.model_dump(mode="json"),
        }
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    test = manifest.measured["self_test"]
    print(f"bundle     {report.folder}")
    recipe = manifest.recipe["name"] + (", calibrated" if manifest.recipe["calibration"] else "")
    print(f"model      {manifest.name}, {manifest.parameter_count:,} parameters, {recipe}")
    if manifest.counter:
        print(f"counter    {manifest.counter}")
    print(f"size       {size / 1e6:,.1f} MB, {manifest.weight_bytes_per_token / 1e6:,.1f} MB read per token")
    print(f"context    {manifest.context_length:,} tokens, {manifest.kv.bytes_per_token:,} bytes of cache each")
    _print_options(manifest)
    print(f"kernels    largest relative difference {test['kernel_difference']:.1e}")
    if oracle:
        print(f"oracle     {oracle['oracle']} {oracle['version']}: {oracle['max_difference']:.1e} in the logits")
    print(f"self-test  {test['prompt']!r} -> {test['next_text']!r}")
    print(f"time       {', '.join(f'{phase} {seconds:.1f} s' for phase, seconds in report.seconds.items())}")


def _print_options(manifest: Manifest) -> None:
    """What only some bundles have."""
    if manifest.state:
        print(f"state      {manifest.state.bytes_per_slot:,} bytes for each sequence")
    if manifest.target != "cpu":
        print(f"target     {manifest.target}, cache in {manifest.kv.dtype}; measured on the processor before that")
    if kv := manifest.measured.get("kv"):
        print(f"cache      {manifest.kv.dtype}, divergence {kv['kl']:.4f} nats, same first choice {kv['top1']:.1%}")
    if quality := manifest.measured.get("quality"):
        change = quality["perplexity"] / quality["reference_perplexity"] - 1
        print(f"quality    KL {quality['kl']:.4f}, same first choice {quality['top1']:.1%}, perplexity {change:+.1%}")
    if head := manifest.recipe.get("mtp"):
        tested = manifest.measured["mtp"]
        right = f", right {tested['top1']:.1%} of the time" if "top1" in tested else ""
        print(f"mtp        {head['parameter_count']:,} parameters, guesses {tested['next_text']!r}{right}")
    for adapter in manifest.adapters:
        print(f"adapter    {manifest.name}:{adapter.name}, rank {adapter.rank}")


def _print_catalog(*, as_json: bool) -> None:
    from export.catalog import catalog

    entries = list(catalog().values())
    if as_json:
        rows = [entry.model_dump(mode="json", exclude={"pieces", "generation"}) for entry in entries]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    print(f"{'NAME':<32} {'PARAMS':>7} {'DOWNLOAD':>9}  {'LICENCE':<14} NOTE")
    for entry in entries:
        print(_catalog_row(entry))


def _catalog_row(entry: CatalogEntry) -> str:
    parameters = f"{entry.parameters / 1e9:.2f}B"
    download = f"{entry.download_bytes / 1e9:.2f} GB"
    return f"{entry.name:<32} {parameters:>7} {download:>9}  {entry.licence:<14} {entry.note}"
