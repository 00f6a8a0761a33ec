"""The engine: appends tokens to slots of the KV pool and returns logits.

It knows token ids, slots and lengths; what a sequence is, who waits and when to stop is the scheduler's business.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from edge.bundle import Manifest, verify_bundle
from edge.engine.heap import trim_heap
from edge.engine.kv_cache import Cache, KVPool
from edge.engine.lora import ActiveAdapters, Adapter, Places, StepAdapters
from edge.engine.session import Inputs, Outputs, Session, Step


class Engine:
    """A bundle loaded into onnxruntime with its KV pool.

    Args:
        bundle: the bundle's folder; the caller has verified it.
        manifest: its manifest.
        slots: sequences that can be in prefill or decode at once.
        context: tokens per sequence, at most the manifest's ``context_length``.
        draft_tokens: tokens of a decode step beyond one for each slot.
        threads: threads of a step; None = one per physical core this process may use.
        prefill_chunk: most tokens of one prefill step.
        spin_us: microseconds that idle threads spin before they sleep.

    Raises:
        BundleError: onnxruntime refuses the graph.
        ConfigError: the KV pool cannot be reserved.
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
        threads: int | None = None,
        prefill_chunk: int = 256,
        spin_us: int = 1000,
    ) -> None:
        self.manifest = manifest
        self.slots = slots
        self.rows = slots + draft_tokens
        self.context_length = min(context, manifest.context_length)
        self.prefill_chunk = prefill_chunk
        self.threads = threads or physical_cores()
        self._bundle = bundle
        self._spin_us = spin_us
        self._row_multiple = manifest.row_multiple
        # One slot more than sequences get, for the rows that only fill a step up; one token more, for the same reason.
        self._pool = KVPool(manifest.kv, slots=slots + 1, context=self.context_length + 1, rows=self._padded(self.rows))
        session = self._session()
        self.places = Places(session.input_shapes())
        """Where the graph takes LoRA adapters."""
        self._adapters = ActiveAdapters(self.places, slots + 1)
        self._loaded: _Loaded | None = self._bind(session)

    def prefill(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n], n <= prefill_chunk, to the ``past`` tokens of a slot.

        Returns:
            Logits [padded_vocab] of the last position; valid until the next call.
        """
        assert 0 < len(ids) <= self.prefill_chunk
        assert past + len(ids) <= self.context_length
        logits: NDArray[np.float32] = self._awake.prefill(slot).run(ids, past)[0]
        return logits

    def score(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n], n <= score_chunk, to the ``past`` tokens of a slot.

        Returns:
            Logits [n, padded_vocab] of all positions; valid until the next call.
        """
        assert 0 < len(ids) <= self.score_chunk
        assert past + len(ids) <= self.context_length
        return self._awake.score(slot).run(ids, past)

    def embed(self, slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n], n <= prefill_chunk, to the ``past`` tokens of a slot.

        Returns:
            Hidden states [n, hidden_size] of all positions, as they go into the head; valid until the next call.
        """
        assert 0 < len(ids) <= self.prefill_chunk
        assert past + len(ids) <= self.context_length
        return self._awake.embed(slot).run(ids, past)

    def decode(self, slots: Sequence[int], ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """Append ``ids[i]`` to the first ``past[i]`` tokens of ``slots[i]``, for up to ``rows`` tokens.

        A slot may be named several times with a ``past`` that grows by one. The result for a token does not depend,
        to the last bit, on which other tokens share the step. Tokens that turn out wrong are taken back by appending
        others over them: pass a smaller ``past``.

        Returns:
            Logits [n, padded_vocab]; valid until the next call.

        Raises:
            EngineError: the system refuses a mapping.
        """
        assert 0 < len(ids) <= self.rows
        assert max(past) < self.context_length
        num_fillers = self._padded(len(ids)) - len(ids)
        slots = [*slots, *[self.slots] * num_fillers]
        return self._awake.decode(len(ids)).run(self._pool.show(slots), slots, ids, past)

    def use_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Let the tokens of a slot be computed with an adapter, or without, until the slot is released."""
        self._adapters.choose(slot, adapter)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a slot over another slot's."""
        self._pool.copy(source, target, length)

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
        if self._loaded is not None:
            self._loaded.drop_mapped()

    def rest(self) -> None:
        """Give back memory that steps have used, as none will come for a moment."""
        if self._loaded is not None:
            self._loaded.drop_mapped()
        trim_heap()

    def sleep(self) -> None:
        """Give the memory of the weights back, until :meth:`wake`. Slots keep their tokens."""
        self._loaded = None
        trim_heap()

    def wake(self) -> None:
        """Verify the bundle and load the weights again; nothing where they are loaded.

        Raises:
            BundleError: the bundle changed or is gone.
        """
        if self._loaded is None:
            verify_bundle(self._bundle)
            self._loaded = self._bind(self._session())

    def _padded(self, rows: int) -> int:
        """Rows that a decode step of so many tokens takes."""
        return _round_up(rows, self._row_multiple)

    def _session(self) -> Session:
        return Session(self._bundle, threads=self.threads, spin_us=self._spin_us)

    def _bind(self, session: Session) -> _Loaded:
        # One for all steps, as logits are valid until the next step only.
        logits = np.zeros((max(self.rows, self.score_chunk), self.manifest.padded_vocab_size), np.float32)
        hidden = np.zeros((_round_up(self.prefill_chunk, 2), self.manifest.hidden_size or 0), np.float32)
        binder = _Binder(session, self._pool, self._adapters, logits, hidden)
        return _Loaded(binder, self.prefill_chunk, self.score_chunk, self._padded)

    @property
    def _awake(self) -> _Loaded:
        assert self._loaded is not None, "the engine sleeps"
        return self._loaded

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        return self.manifest.kv.bytes_per_token


@dataclass(frozen=True)
class _Binder:
    """What steps are bound to."""

    session: Session
    pool: KVPool
    adapters: ActiveAdapters
    logits: NDArray[np.float32]
    """Where every step leaves them [most positions of a step, padded_vocab]."""
    hidden: NDArray[np.float32]
    """Where a step that is asked for them leaves its hidden states [most positions of a step, hidden_size]."""

    def step(
        self, inputs: Inputs, outputs: Outputs, caches: Sequence[tuple[Cache, Cache]]
    ) -> tuple[Step, StepAdapters]:
        """A step and its adapters; see :meth:`edge.engine.session.Session.step`."""
        step = self.session.step(inputs, outputs, caches)
        return step, StepAdapters(self.adapters, step, len(inputs["input_ids"]))


class _Loaded:
    """The steps bound to a session, made when they are first wanted."""

    def __init__(self, binder: _Binder, prefill_chunk: int, score_chunk: int, padded: Callable[[int], int]) -> None:
        self.prefill = cache(lambda slot: _Append(binder, slot, most=prefill_chunk, reads="last"))
        self.score = cache(lambda slot: _Append(binder, slot, most=score_chunk, reads="every"))
        self.embed = cache(lambda slot: _Append(binder, slot, most=prefill_chunk, reads="hidden"))
        self.decode = cache(lambda num_tokens: _Decode(binder, num_tokens, padded(num_tokens)))
        self.drop_mapped = binder.session.drop_mapped


class _Append:
    """Several tokens for one slot: shapes follow the number of tokens, the cache stays bound.

    An odd number of tokens is followed by one that nobody needs, which the next append overwrites: the last row of an
    odd number of rows, and a token by itself, would be rounded in another way than all others (docs/lab-notes.md). So
    a token of a prompt has the same bits however the prompt is cut.

    Args:
        most: most tokens of a step.
        reads: what is wanted of a step: logits of the last position or of every one, or hidden states instead.
    """

    def __init__(self, binder: _Binder, slot: int, *, most: int, reads: Literal["last", "every", "hidden"]) -> None:
        self._reads = reads
        self._slots = np.array([slot])
        self._ids = np.zeros((1, _round_up(most, 2)), np.int64)
        self._seqlens = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._indices = np.arange(most if reads == "every" else 1, dtype=np.int64)
        self._results = binder.hidden if reads == "hidden" else binder.logits[: len(self._indices)]
        self._bound = 0
        inputs: Inputs = {
            "input_ids": self._ids,
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
            "logits_indices": self._indices,
        }
        caches = [binder.pool.slot(layer, slot) for layer in range(binder.pool.layers)]
        outputs = {} if reads == "hidden" else {"logits": self._results}
        self._step, self._adapters = binder.step(inputs, outputs, caches)

    def run(self, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Logits or hidden states [n, ...] of all positions, or logits [1, padded_vocab] of the last."""
        n = len(ids)
        if n != self._bound:
            self._rebind(n)
        padded = _round_up(n, 2)
        self._ids[0, :n] = ids
        self._ids[0, n:padded] = 0
        self._seqlens[0] = past + padded - 1
        self._total[()] = past + padded
        if self._reads == "last":
            self._indices[0] = n - 1
        self._adapters.update(self._slots)
        self._step.run()
        return self._results[:n]

    def _rebind(self, n: int) -> None:
        padded = _round_up(n, 2)
        self._step.bind_input("input_ids", self._ids[:, :padded])
        if self._reads == "every":
            self._step.bind_input("logits_indices", self._indices[:n])
            self._step.bind_output("logits", self._results[:n])
        elif self._reads == "hidden":
            self._step.bind_output("hidden_states", self._results[None, :padded])
        self._bound = n


class _Decode:
    """Decode of the window's first rows: every shape is fixed, only other adapters are ever bound again.

    Args:
        num_tokens: rows with a token.
        rows: all rows; those beyond only fill the step up, since kernels round the last one of an odd number of rows in
            a way of its own.
    """

    def __init__(self, binder: _Binder, num_tokens: int, rows: int) -> None:
        self._num_tokens = num_tokens
        self._slots = np.zeros(rows, np.int64)
        self._ids = np.zeros((rows, 1), np.int64)
        self._seqlens = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits = binder.logits[:num_tokens]
        self._indices = np.zeros(num_tokens, np.int64)
        inputs: Inputs = {
            "input_ids": self._ids,
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
            "logits_indices": self._indices,
        }
        caches = [binder.pool.rows(layer, rows) for layer in range(binder.pool.layers)]
        self._step, self._adapters = binder.step(inputs, {"logits": self._logits}, caches)

    def run(
        self, places: Sequence[int], slots: Sequence[int], ids: Sequence[int], past: Sequence[int]
    ) -> NDArray[np.float32]:
        """Token i goes to row ``places[i]``, which shows ``slots[i]``; its logits come back as row i."""
        wanted, fillers = places[: self._num_tokens], places[self._num_tokens :]
        self._slots[places] = slots
        self._ids[wanted, 0] = ids
        self._seqlens[wanted] = past
        self._seqlens[fillers] = 0
        self._total[()] = max(past) + 1
        self._indices[:] = wanted
        self._adapters.update(self._slots)
        self._step.run()
        return self._logits


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def physical_cores() -> int:
    """Physical cores this process may run on; hyper-threads share one core's arithmetic and only get in the way."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
