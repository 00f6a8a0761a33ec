"""From a verified bundle to a service: the one place where tokenizer, template, engine and scheduler come together."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge import __version__
from edge.adapters import Adapters
from edge.background import in_background
from edge.bundle import CHAT_TEMPLATE, GENERATION, TOKENIZER, Manifest
from edge.chat import ChatTemplate
from edge.config import Settings
from edge.engine.engine import Engine
from edge.engine.heap import trim_heap
from edge.engine.lora import Places
from edge.engine.prefix_cache import PrefixCache
from edge.engine.prefix_store import PrefixStore
from edge.engine.providers import choose
from edge.errors import BundleError, ConfigError
from edge.machine import isa_features
from edge.metrics import Metrics
from edge.model import Model
from edge.planning.available import read_available
from edge.planning.check import check_memory
from edge.planning.graph_file import read_shape
from edge.planning.machine import has_int8_kernels
from edge.planning.memory import DEFAULT_CONTEXT, Serving, prefix_budget
from edge.power import Sensors
from edge.scheduler import Scheduler
from edge.service import Loaded, Service
from edge.settings.engine import EngineSettings
from edge.throttle import Limits, Throttle
from edge.tokenizer import Tokenizer
from edge.trust import trust_of

log = logging.getLogger(__name__)


class GenerationDefaults(BaseModel):
    """``generation.json``: where the model stops, and how its makers want it sampled."""

    model_config = ConfigDict(frozen=True)

    eos_token_ids: tuple[int, ...] = Field(min_length=1)
    do_sample: bool = False
    """Without it the model is decoded greedily, whatever the other values say."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    def sampling(self) -> dict[str, float | int]:
        """The values as fields of :class:`edge.engine.sampler.SamplingParams`."""
        names = {"repetition_penalty"} | ({"temperature", "top_p", "top_k"} if self.do_sample else set())
        return self.model_dump(include=names, exclude_none=True)


def load_service(bundle: Path, manifest: Manifest, settings: Settings, *, imports: Sequence[str] = ()) -> Service:
    """Load a bundle into a service, which is not started yet; arguments and errors as for :func:`load_bundle`."""
    return Service(load_bundle(bundle, manifest, settings, imports=imports), Metrics(Sensors()))


def load_bundle(bundle: Path, manifest: Manifest, settings: Settings, *, imports: Sequence[str] = ()) -> Loaded:
    """Load a bundle's text side and its engine.

    Two threads share the work. Packing the weights leaves Python to the other one; reading the vocabulary does not, so
    that it begins after the imports, which do.

    Args:
        bundle: the folder; the caller has verified it.
        manifest: its manifest.
        settings: engine and scheduler settings.
        imports: modules that the caller needs next.

    Raises:
        BundleError: a file is not what its name promises, or onnxruntime refuses the graph.
        ConfigError: the context is longer than the bundle's, the cache does not fit, the memory does not suffice, or
            the provider cannot be used.
    """
    options = settings.engine
    context = _context(manifest, options)
    provider = choose(options.provider, manifest.target)
    if provider.name == "cpu" and options.memory_check == "on":
        _check_memory(bundle, manifest, options, context)
    log.info("computing with %s: %s", provider.name, provider.reason)
    # A GPU verifies guesses one by one: they would gain nothing.
    draft_tokens = options.draft_tokens if provider.name == "cpu" else 0
    text = in_background(lambda: _import_and_load(imports, bundle, manifest, context))
    engine = Engine(
        bundle,
        manifest,
        slots=options.slots,
        context=context,
        draft_tokens=draft_tokens,
        provider=provider.name,
        threads=options.threads,
        prefill_chunk=options.prefill_chunk,
        spin_us=options.spin_us,
        trust=trust_of(settings.model),
    )
    model = replace(text.result(), adapters=load_adapters(engine.places, bundle, manifest, settings.model.adapters))
    sensors, power = Sensors(), settings.power
    limits = Limits(power.throttle_from_c, power.throttle_until_c, power.max_w)
    scheduler = Scheduler(
        engine,
        max_queue=settings.scheduler.max_queue,
        prefixes=load_prefixes(manifest, options),
        draft_tokens=draft_tokens,
        kv_cache_bytes=None if options.kv_cache_mb is None else options.kv_cache_mb << 20,
        sleep_after_s=options.sleep_after_s,
        energy_j=sensors.energy.energy_j,
        throttle=Throttle(limits, sensors),
    )
    return Loaded(model, scheduler, settings.scheduler.default_max_tokens, provider)


def load_adapters(places: Places, bundle: Path, manifest: Manifest, folder: Path | None) -> Adapters | None:
    """What requests can choose beside the model; None where neither bundle nor settings offer any.

    Raises:
        BundleError: there is a ``folder`` of adapters, but the bundle has no places for them.
    """
    return Adapters(places, bundle, manifest, folder) if places.linears or folder else None


def load_prefixes(manifest: Manifest, options: EngineSettings) -> PrefixCache:
    """The cache of past prompts, with what earlier runs kept on disk where that is configured.

    Args:
        manifest: of the served bundle.
        options: budgets and folder.
    """
    budget = prefix_budget(options, manifest.state)
    store = None
    if options.prefix_store is not None and budget:
        store = PrefixStore.open(options.prefix_store, options.prefix_store_mb << 20, _computed_by(manifest))
    return PrefixCache(budget, store)


def load_model(bundle: Path, manifest: Manifest, context_length: int) -> Model:
    """The text side of a bundle.

    Raises:
        BundleError: tokenizer, chat template or generation defaults are malformed.
    """
    defaults = _read_generation(bundle / GENERATION)
    has_template = any(entry.path == CHAT_TEMPLATE for entry in manifest.files)
    return Model(
        manifest=manifest,
        tokenizer=Tokenizer.load(bundle / TOKENIZER),
        template=ChatTemplate.load(bundle / CHAT_TEMPLATE) if has_template else None,
        eos_ids=frozenset(defaults.eos_token_ids),
        sampling_defaults=defaults.sampling(),
        context_length=context_length,
    )


def _import_and_load(imports: Sequence[str], bundle: Path, manifest: Manifest, context_length: int) -> Model:
    for name in imports:
        import_module(name)
    model = load_model(bundle, manifest, context_length)
    trim_heap()  # reading a vocabulary leaves 40 MB of crumbs
    return model


def _check_memory(bundle: Path, manifest: Manifest, options: EngineSettings, context: int) -> None:
    """Refuse what the kernel would end for its memory; see :func:`edge.planning.check.check_memory`."""
    available = read_available()
    if available is None:
        return
    try:
        shape = read_shape(bundle, manifest)
    except BundleError as error:
        log.debug("the memory is not checked: %s", error)  # what is wrong with the graph, onnxruntime knows better
        return
    serving = Serving.of(options.model_copy(update={"context": context}), manifest)
    check_memory(shape, serving, available, int8=has_int8_kernels(isa_features()))


def _computed_by(manifest: Manifest) -> bytes:
    """What keys and values depend on besides the tokens: every file of the bundle, the cache's layout, the code."""
    facts = {
        "files": {entry.path: entry.sha256 for entry in manifest.files},
        "kv": manifest.kv.model_dump(),
        "qwedge": __version__,
        "onnxruntime": version("onnxruntime"),
    }
    return json.dumps(facts, sort_keys=True).encode()


def _context(manifest: Manifest, options: EngineSettings) -> int:
    """Tokens of one conversation: what is asked for, or as many as bundle, default and cache budget allow."""
    wanted = options.context or min(DEFAULT_CONTEXT, manifest.context_length)
    if wanted > manifest.context_length:
        hint = f"use at most {manifest.context_length}, or export again with a larger --context"
        raise ConfigError(f"a context of {wanted} tokens is more than the bundle has", hint=hint)
    if options.kv_cache_mb is None:
        return wanted
    states = manifest.state.bytes_per_slot if manifest.state else 0
    room = max(0, (options.kv_cache_mb << 20) - states) // manifest.kv.bytes_per_token
    if room == 0 or (options.context is not None and wanted > room):
        hint = f"it holds {room} tokens of this model: raise engine.kv_cache_mb or lower engine.context"
        raise ConfigError(f"a context of {wanted} tokens does not fit into the KV cache", hint=hint)
    return min(wanted, room)


def _read_generation(path: Path) -> GenerationDefaults:
    try:
        return GenerationDefaults.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors(include_url=False)[0]["msg"]
        raise BundleError(f"{path} cannot be used: {reason}", hint="export the bundle again") from None
