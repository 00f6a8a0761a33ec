"""``qwedge bench``: how fast is this bundle on this machine?"""

from __future__ import annotations

import platform
import random
import resource
import statistics
import time
from dataclasses import asdict, dataclass, fields
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge import __version__
from edge.bundle import WEIGHTS, Manifest
from edge.commands import options
from edge.config import Settings
from edge.machine import cpu_model

if TYPE_CHECKING:  # these bring onnxruntime, which `qwedge --help` does without
    from edge.service import Service

SEED = 1
"""Of the prompts: every run reads the same tokens."""


@dataclass(frozen=True)
class Sample:
    """One measured request."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class Loaded:
    """A service, and what it took to get it."""

    service: Service
    manifest: Manifest
    verify_s: float
    load_s: float
    rss_bytes: int


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    *,
    bundle: options.Bundle = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, metavar="N", help="Prompt length.")] = 256,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=2, metavar="N", help="Answer length.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=100, metavar="N", help="Measured requests.")] = 5,
    threads: options.Threads = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Measure prefill and decode.

    One request at a time, random prompts, greedy decoding past the end of the answer, no guessing ahead. A first
    request goes unmeasured. Figures are medians. GB/s is the speed at which decoding reads the weights.
    """
    chosen = options.settings(
        config,
        model__bundle=bundle,
        engine__threads=threads,
        engine__slots=1,
        engine__draft_tokens=0,
        engine__context=prompt_tokens + output_tokens,
    )
    loaded = _load(chosen)
    loaded.service.start()
    try:
        prompts = _prompts(loaded.manifest.vocab_size, prompt_tokens, repeats + 1)
        samples = [measure(loaded.service, prompt, output_tokens) for prompt in prompts][1:]
    finally:
        loaded.service.stop()
    result = _report(loaded, samples, chosen.engine.threads, prompt_tokens, output_tokens)
    if as_json:
        options.print_json(result)
    else:
        print(_table(result))


def measure(service: Service, prompt: tuple[int, ...], output_tokens: int) -> Sample:
    """Run one request and turn its timings into figures.

    Raises:
        QwedgeError: the request is refused or failed.
    """
    from edge.engine.sampler import SamplingParams
    from edge.service import Event, Failed, Finished, GenerationRequest

    events: SimpleQueue[Event] = SimpleQueue()
    request = GenerationRequest(prompt, SamplingParams(), max_tokens=output_tokens, ignore_eos=True)
    service.submit(request, events.put)
    while not isinstance(event := events.get(), Finished | Failed):
        pass
    if isinstance(event, Failed):
        raise event.error
    timings = event.timings
    return Sample(
        prefill_tokens_per_second=timings.num_prompt_tokens / timings.prefill_s,
        decode_tokens_per_second=1 / timings.tpot_s,
        ttft_ms=timings.ttft_s * 1000,
        tpot_ms=timings.tpot_s * 1000,
    )


def _load(chosen: Settings) -> Loaded:
    from edge.commands.loading import bundle_of
    from edge.commands.verify import check_bundle
    from edge.loader import load_service
    from edge.trust import trust_of

    bundle = bundle_of(chosen)
    began = time.perf_counter()
    manifest = check_bundle(bundle, trust_of(chosen.model))
    verified = time.perf_counter()
    service = load_service(bundle, manifest, chosen)
    load_s = time.perf_counter() - verified
    return Loaded(service, manifest, verified - began, load_s, _rss_bytes())


def _rss_bytes() -> int:
    import psutil

    rss: int = psutil.Process().memory_info().rss
    return rss


def _prompts(vocab_size: int, length: int, count: int) -> list[tuple[int, ...]]:
    # Different prompts, so that no cache of prefixes can help.
    source = random.Random(SEED)  # noqa: S311 - no secret
    return [tuple(source.randrange(vocab_size) for _ in range(length)) for _ in range(count)]


def _report(
    loaded: Loaded, samples: list[Sample], threads: int | None, prompt_tokens: int, output_tokens: int
) -> dict[str, Any]:
    from edge.engine.engine import physical_cores

    manifest = loaded.manifest
    medians = {
        field.name: round(statistics.median(getattr(sample, field.name) for sample in samples), 3)
        for field in fields(Sample)
    }
    return {
        "qwedge": __version__,
        "model": manifest.name,
        "recipe": manifest.recipe.get("name"),
        "weights_sha256": next(entry.sha256 for entry in manifest.files if entry.path == WEIGHTS),
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "threads": threads or physical_cores(),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "repeats": len(samples),
        **medians,
        "weight_bytes_per_token": manifest.weight_bytes_per_token,
        "weight_gb_per_second": round(medians["decode_tokens_per_second"] * manifest.weight_bytes_per_token / 1e9, 3),
        "kv_bytes_per_token": manifest.kv.bytes_per_token,
        "verify_s": round(loaded.verify_s, 3),
        "load_s": round(loaded.load_s, 3),
        "rss_loaded_bytes": loaded.rss_bytes,
        "rss_bytes": _rss_bytes(),
        "rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "samples": [asdict(sample) for sample in samples],
    }


def _table(result: dict[str, Any]) -> str:
    lines = {
        "model": f"{result['model']} ({result['recipe']})",
        "machine": f"{result['cpu']}, {result['threads']} threads",
        "prefill": f"{result['prefill_tokens_per_second']:.1f} tokens/s ({result['prompt_tokens']} tokens)",
        "decode": f"{result['decode_tokens_per_second']:.1f} tokens/s ({result['output_tokens']} tokens)",
        "first token": f"{result['ttft_ms']:.0f} ms",
        "weights": f"{result['weight_bytes_per_token'] / 1e6:.0f} MB/token, {result['weight_gb_per_second']:.1f} GB/s",
        "verify, load": f"{result['verify_s']:.1f} s, {result['load_s']:.1f} s",
        "memory": f"{result['rss_bytes'] / 1e6:.0f} MB, peak {result['rss_peak_bytes'] / 1e6:.0f} MB",
        "repeats": f"{result['repeats']}, medians",
    }
    return "\n".join(f"{name:<13} {text}" for name, text in lines.items())
