"""The process that loads a finished folder and generates from it: ``python -m export.self_test``.

It reads a request as JSON from standard input and writes what it measured as JSON to standard output. It runs apart
from the export, so that the exporter's own memory stays small and a crash of the kernel ends as one clear error.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.bundle import GRAPH

Cache = dict[str, NDArray[np.float32]]


class Decoder:
    """The graph as plain onnxruntime runs it: no buffer sharing, one sequence.

    Args:
        graph: path of model.onnx.
        layers, kv_heads, head_dim: shape of the cache.
    """

    def __init__(self, graph: str, *, layers: int, kv_heads: int, head_dim: int) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(graph, options, ["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        empty = np.zeros((1, kv_heads, 0, head_dim), np.float32)
        self._cache: Cache = {f"past_key_values.{i}.{kind}": empty for i in range(layers) for kind in ("key", "value")}
        self._past = 0

    def append(self, ids: list[int]) -> NDArray[np.float32]:
        """Append tokens; returns the logits [len(ids), padded_vocab] of all of them."""
        total = self._past + len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "seqlens_k": np.array([total - 1], np.int32),
            "total_sequence_length": np.array(total, np.int32),
            "logits_indices": np.arange(len(ids), dtype=np.int64),
            **self._cache,
        }
        results = dict(zip(self._outputs, self._session.run(None, inputs), strict=True))
        logits: NDArray[np.float32] = results.pop("logits")
        self._cache = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        self._past = total
        return logits


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Load, generate greedily, measure.

    Raises:
        SystemExit: the logits are not finite.
    """
    started = time.monotonic()
    decoder = Decoder(f"{request['folder']}/{GRAPH}", **request["kv"])
    load_s = time.monotonic() - started
    ids, next_ids = request["prompt_ids"], []
    for _ in range(request["num_tokens"]):
        logits = decoder.append(ids)
        if not np.isfinite(logits).all():
            sys.exit("the logits are not finite")
        next_ids.append(int(logits[-1].argmax()))
        ids = next_ids[-1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"prompt_ids": request["prompt_ids"], "next_ids": next_ids, "load_s": load_s, "peak_rss_mb": round(peak)}


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
