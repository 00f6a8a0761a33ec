"""The engine: appends tokens to rows of the KV pool and returns logits.

It knows token ids, rows and lengths; what a sequence is, who waits and when to stop is the scheduler's business.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from edge.bundle import Manifest
from edge.engine.kv_cache import KVPool
from edge.engine.session import Inputs, Session
from edge.engine.speculation import MAX_DRAFT


class Engine:
    """A bundle loaded into onnxruntime with its KV pool.

    Args:
        bundle: the bundle's folder; the caller has verified it.
        manifest: its manifest.
        slots: sequences that can be in prefill or decode at once.
        context: tokens per sequence, at most the manifest's ``context_length``.
        threads: threads of a step; None = one per physical core this process may use.
        prefill_chunk: most tokens of one prefill step.
        spin_us: microseconds that idle threads spin before they sleep.

    Raises:
        BundleError: onnxruntime refuses the graph.
        ConfigError: the KV pool cannot be reserved.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        slots: int,
        context: int,
        threads: int | None = None,
        prefill_chunk: int = 256,
        spin_us: int = 1000,
    ) -> None:
        self.manifest = manifest
        self.slots = slots
        self.context_length = min(context, manifest.context_length)
        self.prefill_chunk = prefill_chunk
        self.threads = threads or physical_cores()
        self._pool = KVPool(manifest.kv, slots=slots, context=self.context_length)
        self._session = Session(bundle, threads=self.threads, spin_us=spin_us)
        self._prefill_steps: dict[int, _Append] = {}
        self._verify_steps: dict[int, _Append] = {}
        self._decode_steps: dict[int, _Decode] = {}

    def prefill(self, row: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n], n <= prefill_chunk, to the ``past`` tokens of ``row``.

        Returns:
            Logits [padded_vocab] of the last position; valid until the next call.
        """
        assert 0 <= row < self.slots
        assert 0 < len(ids) <= self.prefill_chunk
        assert past + len(ids) <= self.context_length
        if row not in self._prefill_steps:
            self._prefill_steps[row] = self._append(row, self.prefill_chunk, all_logits=False)
        logits: NDArray[np.float32] = self._prefill_steps[row].run(ids, past)[0]
        return logits

    def verify(self, row: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Append ``ids`` [n], n <= MAX_DRAFT + 1, to the ``past`` tokens of ``row``.

        Tokens that turn out wrong are taken back by appending the next ones over them: pass a smaller ``past``.

        Returns:
            Logits [n, padded_vocab] of all positions; valid until the next call.
        """
        assert 0 <= row < self.slots
        assert 0 < len(ids) <= MAX_DRAFT + 1
        assert past + len(ids) <= self.context_length
        if row not in self._verify_steps:
            self._verify_steps[row] = self._append(row, MAX_DRAFT + 1, all_logits=True)
        return self._verify_steps[row].run(ids, past)

    def decode(self, ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        """Append ``ids[i]`` to the ``past[i]`` tokens of row i, for rows 0..n-1.

        Returns:
            Logits [n, padded_vocab]; valid until the next call.
        """
        batch = len(ids)
        assert 0 < batch <= self.slots
        assert max(past) < self.context_length
        if batch not in self._decode_steps:
            self._decode_steps[batch] = _Decode(self._session, self._pool, batch, self._width)
        return self._decode_steps[batch].run(ids, past)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a row over another row and give the source's memory back."""
        self._pool.move_row(source, target, length)

    def read_row(self, row: int, length: int) -> NDArray[np.float32]:
        """A copy of the keys and values of a row's first tokens [2 * layers, kv_heads, length, head_dim]."""
        return self._pool.read_row(row, length)

    def write_row(self, row: int, cache: NDArray[np.float32], length: int) -> None:
        """Put the first ``length`` tokens of what :meth:`read_row` returned into a row."""
        self._pool.write_row(row, cache, length)

    def release_row(self, row: int) -> None:
        """Give a row's memory back to the system."""
        self._pool.release(row)

    def _append(self, row: int, most: int, *, all_logits: bool) -> _Append:
        return _Append(self._session, self._pool, row, most=most, all_logits=all_logits, width=self._width)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        return self.manifest.kv.bytes_per_token

    @property
    def _width(self) -> int:
        return self.manifest.padded_vocab_size


class _Append:
    """Several tokens for one row: shapes follow the number of tokens, the cache stays bound.

    Args:
        most: most tokens of a step.
        all_logits: whether every position gets logits, or the last one only.
    """

    def __init__(self, session: Session, pool: KVPool, row: int, *, most: int, all_logits: bool, width: int) -> None:
        self._all_logits = all_logits
        self._ids = np.zeros((1, most), np.int64)
        self._seqlens = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._indices = np.arange(most if all_logits else 1, dtype=np.int64)
        self._logits: NDArray[np.float32] = np.zeros((len(self._indices), width), np.float32)
        self._bound = most
        inputs: Inputs = {
            "input_ids": self._ids,
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
            "logits_indices": self._indices,
        }
        self._step = session.step(inputs, self._logits, pool, row)

    def run(self, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Logits [n, padded_vocab] of all positions, or [1, padded_vocab] of the last."""
        n = len(ids)
        if n != self._bound:
            self._rebind(n)
        self._ids[0, :n] = ids
        self._seqlens[0] = past + n - 1
        self._total[()] = past + n
        if not self._all_logits:
            self._indices[0] = n - 1
        self._step.run()
        return self._logits[:n]

    def _rebind(self, n: int) -> None:
        self._step.bind_input("input_ids", self._ids[:, :n])
        if self._all_logits:
            self._step.bind_input("logits_indices", self._indices[:n])
            self._step.bind_output("logits", self._logits[:n])
        self._bound = n


class _Decode:
    """Decode of rows 0..batch-1: every shape is fixed, nothing is ever bound again."""

    def __init__(self, session: Session, pool: KVPool, batch: int, width: int) -> None:
        self._ids = np.zeros((batch, 1), np.int64)
        self._seqlens = np.zeros(batch, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits = np.zeros((batch, width), np.float32)
        self._indices = np.arange(batch, dtype=np.int64)
        inputs: Inputs = {
            "input_ids": self._ids,
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
            "logits_indices": self._indices,
        }
        self._step = session.step(inputs, self._logits, pool, 0)

    def run(self, ids: Sequence[int], past: Sequence[int]) -> NDArray[np.float32]:
        self._ids[:, 0] = ids
        self._seqlens[:] = past
        self._total[()] = max(past) + 1
        self._step.run()
        return self._logits


def physical_cores() -> int:
    """Physical cores this process may run on; hyper-threads share one core's arithmetic and only get in the way."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
