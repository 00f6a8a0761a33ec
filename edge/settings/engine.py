"""``[model]``, ``[engine]`` and ``[scheduler]``: what is served, with which memory, and to how many at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from edge.settings.section import Section


class ModelSettings(Section):
    """What is served."""

    bundle: Path | None = Field(
        None,
        description="A bundle's folder, as `qwedge export` writes it. Without it, the active one of `store`.",
    )
    store: Path | None = Field(
        None,
        description="Folder of the installed bundles; see docs/model-store.md. Without it, `models` in"
        " `$STATE_DIRECTORY`, `$XDG_STATE_HOME/qwedge` or `~/.local/state/qwedge`.",
    )
    trust: Path | None = Field(
        None,
        description="Folder of public keys (`*.pub` of `qwedge keys init`): a bundle that none of them signed is"
        " refused. Without it, signatures are not looked at.",
    )
    adapters: Path | None = Field(
        None, description="A folder of further LoRA adapters, each a folder as PEFT saves it; looked at while serving."
    )


class EngineSettings(Section):
    """The engine: threads and memory."""

    provider: Literal["auto", "cpu", "cuda", "tensorrt", "webgpu"] = Field(
        "auto",
        description="What computes. `auto`: what the bundle was made for; a bundle for a GPU does not run without one."
        " See docs/gpu.md.",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="Threads of the engine; without it, one for each physical core."
    )
    context: int | None = Field(
        None,
        ge=16,
        le=1 << 20,
        description="Tokens of one conversation; without it, the bundle's or 4096, the smaller.",
    )
    slots: int = Field(
        8, ge=1, le=64, description="Sequences that are worked on at once; their cache takes memory only as it fills."
    )
    kv_cache_mb: int | None = Field(
        None,
        ge=1,
        le=1 << 20,
        description="MiB for keys, values and states of all sequences at work; when they are used up, the youngest"
        " sequence waits and is computed again later. Without it, `slots` times `context` tokens.",
    )
    prefill_chunk: int = Field(
        256,
        ge=8,
        le=8192,
        description="Prompt tokens read in one step; half of it while answers are running, which pause for as long.",
    )
    draft_tokens: int = Field(
        8,
        ge=0,
        le=60,
        description="Most tokens guessed ahead in one step from the text so far and the grammar, for all sequences"
        " together; 0 never guesses. Answers that copy (code edits, extractions) get faster, and no answer changes.",
    )
    prefix_cache_mb: int | None = Field(
        None,
        ge=0,
        le=1 << 16,
        description="MiB for keys, values and states of past prompts, so that a shared system prompt or a growing"
        " conversation is not read again; 0 keeps none. Without it 64, and room for four states of a model that has"
        " them.",
    )
    prefix_store: Path | None = Field(
        None,
        description="Folder that keeps past prompts with their keys and values over a restart, for this process alone;"
        " without it, they are kept in memory only.",
    )
    prefix_store_mb: int = Field(
        512, ge=1, le=1 << 20, description="MiB of files in `prefix_store`; the least recently used are removed."
    )
    memory_check: Literal["on", "off"] = Field(
        "on",
        description="`on` refuses to load a model for which the memory does not suffice, and says what would fit"
        " (docs/planning.md); `off` loads it all the same.",
    )
    spin_us: int = Field(
        1000,
        ge=0,
        le=1_000_000,
        description="Microseconds that idle engine threads spin before they sleep; 0 saves power on a battery.",
    )
    sleep_after_s: float | None = Field(
        None,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Seconds without a request after which the weights leave the memory; the next request waits until"
        " they are back. Without it, never.",
    )


class SchedulerSettings(Section):
    """Admission of requests."""

    max_queue: int = Field(64, ge=1, le=10_000, description="Requests that may wait; the next is answered with 429.")
    default_max_tokens: int | None = Field(
        None, ge=1, le=1 << 20, description="Tokens of an answer whose request names no limit; without it, the context."
    )
