"""The engine: appends tokens to slots of the KV pool and returns logits.

It knows token ids, slots and lengths; what a sequence is, who waits and when to stop is the scheduler's business.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from numpy.typing import NDArray

from edge.bundle import Manifest, verify_bundle
from edge.engine.device import Device, DevicePool, DeviceSession, DeviceSteps
from edge.engine.heap import trim_heap
from edge.engine.kv_cache import Cache, KVPool
from edge.engine.lora import ActiveAdapters, Adapter, Places
from edge.engine.providers import Provider
from edge.engine.recurrent_steps import RecurrentSteps
from edge.engine.rows import UNIT, row_multiple
from edge.engine.session import Session
from edge.engine.state_pool import State, StatePool
from edge.engine.steps import Binder, Sizes, Steps

if TYPE_CHECKING:  # this brings the cryptography
    from edge.signing import Trust


class Engine:
    """A bundle loaded into onnxruntime with its KV pool.

    Args:
        bundle: the bundle's folder; the caller has verified it.
        manifest: its manifest.
        slots: sequences that can be in prefill or decode at once.
        context: tokens per sequence, at most the manifest's ``context_length``.
        draft_tokens: tokens of a decode step beyond one for each slot.
        provider: what computes, as :func:`edge.engine.providers.choose` says.
        threads: threads of a step; None = one per physical core this process may use.
        prefill_chunk: most tokens of one prefill step.
        spin_us: microseconds that idle threads spin before they sleep.
        trust: the keys of which one must have signed the bundle when it is loaded again; None = none needs to.

    Raises:
        BundleError: onnxruntime refuses the graph.
        ConfigError: the KV pool cannot be reserved, or the provider not be used.
    """

    score_chunk = 16
    """Most tokens of one scoring step: each takes a row of logits, which is 0.6 MB."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        slots: int,
        context: int,
        draft_tokens: int = 0,
        provider: Provider = "cpu",
        threads: int | None = None,
        prefill_chunk: int = 256,
        spin_us: int = 1000,
        trust: Trust | None = None,
    ) -> None:
        self.manifest = manifest
        self.slots = slots
        self.rows = slots + draft_tokens
        self.context_length = min(context, manifest.context_length)
        self.prefill_chunk = prefill_chunk
        self.threads = threads or physical_cores()
        self._bundle = bundle
        self._trust = trust
        self._spin_us = spin_us
        self._sizes = Sizes(prefill_chunk, self.score_chunk, row_multiple(manifest.row_multiple), filler=slots)
        self._device = None if provider == "cpu" else Device(provider)
        self._pool = self._new_pool()
        self._states: StatePool | None = None
        if manifest.state is not None:
            self._states = StatePool(manifest.state, slots=slots)
        session = self._session()
        self.places = Places(session.input_shapes())
        """Where the graph takes LoRA adapters."""
        self._adapters = ActiveAdapters(self.places, slots + 1)
        self._loaded: Steps | RecurrentSteps | DeviceSteps | None = self._bind(session)

    def prefill(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n], n <= prefill_chunk, to the ``past`` tokens of a slot.

        Returns:
            Logits [padded_vocab] of the last position; valid until the next call.
        """
        assert 0 < len(ids) <= self.prefill_chunk
        assert past + len(ids) <= self.context_length
        logits: NDArray[np.float32] = self._awake.prefill(slot, ids, past)[0]
        return logits

    def score(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n], n <= score_chunk, to the ``past`` tokens of a slot.

        Returns:
            Logits [n, padded_vocab] of all positions; valid until the next call.
        """
        assert 0 < len(ids) <= self.score_chunk
        assert past + len(ids) <= self.context_length
        return self._awake.score(slot, ids, past)

    def embed(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n], n <= prefill_chunk, to the ``past`` tokens of a slot.

        Returns:
            Hidden states [n, hidden_size] of all positions, as they go into the head; valid until the next call.
        """
        assert 0 < len(ids) <= self.prefill_chunk
        assert past + len(ids) <= self.context_length
        return self._awake.embed(slot, ids, past)

    def decode(self, slots: Sequence[int], ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """Append ``ids[i]`` to the first ``past[i]`` tokens of ``slots[i]``, for up to ``rows`` tokens.

        A slot may be named several times with a ``past`` that grows by one. The result for a token does not depend,
        to the last bit, on which other tokens share the step. Tokens that turn out wrong are taken back by appending
        others over them: pass a smaller ``past``, one that :meth:`kept_length` allows.

        Returns:
            Logits [n, padded_vocab]; valid until the next call.

        Raises:
            EngineError: the system refuses a mapping.
        """
        assert 0 < len(ids) <= self.rows
        assert max(past) < self.context_length
        return self._awake.decode(slots, ids, past)

    def use_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Let the tokens of a slot be computed with an adapter, or without, until the slot is released."""
        self._adapters.choose(slot, adapter)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a slot over another slot's."""
        self._pool.copy(source, target, length)
        if self._states is not None:
            self._states.copy(source, target, length)

    def kept_length(self, slot: int, most: int) -> int:
        """The longest beginning of a slot, of at most ``most`` tokens, that can be gone on from or read.

        All of them can, but where layers of linear attention have a state: then those whose state is still there, which
        are all tokens, and the ones before the last :meth:`decode` of several tokens; 0 if there is none.
        """
        return most if self._states is None else self._states.kept_length(slot, most)

    def read_state(self, slot: int, length: int) -> State | None:
        """A copy of a slot's state after its first tokens; None for models that have none."""
        return None if self._states is None else self._states.read(slot, length)

    def write_state(self, slot: int, state: State, length: int) -> None:
        """Give a slot what :meth:`read_state` returned, beside :meth:`write_slot`."""
        assert self._states is not None
        self._states.write(slot, state, length)

    def read_slot(self, slot: int, length: int) -> Cache:
        """A copy of the keys and values of a slot's first tokens [2 * layers, kv_heads, length, head_dim]."""
        return self._pool.read(slot, length)

    def write_slot(self, slot: int, cache: Cache, length: int) -> None:
        """Put the first ``length`` tokens of what :meth:`read_slot` returned into a slot."""
        self._pool.write(slot, cache, length)

    def release_slot(self, slot: int) -> None:
        """Give a slot's memory back to the system; its adapter is not used any more."""
        self._adapters.choose(slot, None)
        self._pool.release(slot)
        if self._states is not None:
            self._states.release(slot)
        if self._loaded is not None:
            self._loaded.drop_mapped()

    def rest(self) -> None:
        """Give back memory that steps have used, as none will come for a moment."""
        if self._loaded is not None:
            self._loaded.drop_mapped()
        if self._states is not None:
            self._states.rest()
        trim_heap()

    def sleep(self) -> None:
        """Give the memory of the weights back, until :meth:`wake`. Slots keep their tokens."""
        self._loaded = None
        trim_heap()

    def wake(self) -> None:
        """Verify the bundle and load the weights again; nothing where they are loaded.

        Raises:
            BundleError: the bundle changed or is gone, or its key is not trusted any more.
        """
        if self._loaded is None:
            verify_bundle(self._bundle, trust=self._trust)
            self._loaded = self._bind(self._session())

    def _new_pool(self) -> KVPool | DevicePool:
        if self._device is not None:
            return DevicePool(self._device, self.manifest.kv, slots=self.slots, context=self.context_length)
        # One slot more than sequences get, and some tokens more, for what only fills steps up.
        rows = self._sizes.padded(self.rows)
        return KVPool(self.manifest.kv, slots=self.slots + 1, context=self.context_length + UNIT, rows=rows)

    def _session(self) -> Session:
        threads, spin_us, context = self.threads, self._spin_us, self.context_length
        if self._device is not None:
            return DeviceSession(self._bundle, self._device, threads=threads, spin_us=spin_us, context=context)
        return Session(self._bundle, threads=threads, spin_us=spin_us, context=context)

    def _bind(self, session: Session) -> Steps | RecurrentSteps | DeviceSteps:
        # One for all steps, as logits are valid until the next step only.
        logits = np.zeros((max(self.rows, self.score_chunk), self.manifest.padded_vocab_size), np.float32)
        hidden = np.zeros((self.prefill_chunk + UNIT, self.manifest.hidden_size or 0), np.float32)
        if isinstance(self._pool, DevicePool):
            return DeviceSteps(Binder(session, self._pool, self._adapters, logits, hidden), self._sizes)
        binder = Binder(session, self._pool, self._adapters, logits, hidden)
        if self._states is None:
            return Steps(binder, self._sizes)
        return RecurrentSteps(binder, self._sizes, self._states)

    @property
    def _awake(self) -> Steps | RecurrentSteps | DeviceSteps:
        assert self._loaded is not None, "the engine sleeps"
        return self._loaded

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        return self.manifest.kv.bytes_per_token

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of state that one sequence takes, however long it is."""
        return self.manifest.state.bytes_per_slot if self.manifest.state else 0


def physical_cores() -> int:
    """Physical cores this process may run on; hyper-threads share one core's arithmetic and only get in the way."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
