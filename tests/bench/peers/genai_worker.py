"""onnxruntime-genai as a worker: prompts as JSON lines on stdin, answers with their times on stdout.

Runs in the environment of onnxruntime-genai, with nothing but it and the standard library. It is served as well as it
can be: the cache is as long as the answer will get, the beginning that a prompt shares with the one before is kept, and
a grammar forces tokens without running the model.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found] # it lives in an environment of its own

SPARE = 64
"""Tokens of room for a following prompt with the same beginning."""
COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""Without it, a small model may go on with white space until its limit."""
NEVER = 151_935
"""An id beyond Qwen's vocabulary as the end of text: this worker decides itself where an answer ends."""


class Worker:
    """A loaded model and the generator of the last single prompt."""

    def __init__(self, folder: str, threads: int, ends: list[int]) -> None:
        self._ends = set(ends)
        config = og.Config(folder)
        decoder = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"eos_token_id": [NEVER], "decoder": decoder}}))
        self._model = og.Model(config)
        self._generator: Any = None
        self._ids: list[int] = []
        self._capacity = 0

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """One prompt, or several of them at once, padded to one length."""
        if len(job["prompts"]) > 1:
            return self._answer_batch(job["prompts"], job["max_tokens"])
        return self._answer_one(job["prompts"][0], job)

    def _answer_one(self, ids: list[int], job: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        cached = self._begin(ids, job["max_tokens"], job["schema"])
        first_s = 0.0
        tokens: list[int] = []
        while len(tokens) < job["max_tokens"] and not self._generator.is_done():
            self._generator.generate_next_token()
            new = [int(token) for token in self._generator.get_sequence(0)[len(ids) + len(tokens) :]]
            first_s = first_s or time.perf_counter() - began
            tokens += new
            if self._ends & set(new) and not job["fixed"]:
                break
        total_s = time.perf_counter() - began
        self._ids = [] if job["schema"] else ids
        tokens = [token for token in tokens if token not in self._ends]
        answer = {"tokens": tokens, "cached": cached, "first_s": first_s, "total_s": total_s}
        return {"answers": [answer], "wall_s": total_s}

    def _begin(self, ids: list[int], max_tokens: int, schema: dict[str, Any] | None) -> int:
        """Prefill; returns how many tokens of the prompt were there already."""
        # The last token is never kept: its logits are needed.
        shared = min(_shared(self._ids, ids), len(ids) - 1)
        if schema is None and shared >= SPARE and len(ids) + max_tokens <= self._capacity:
            self._generator.rewind_to(shared)
        else:
            shared, self._capacity = 0, len(ids) + max_tokens + SPARE
            params = og.GeneratorParams(self._model)
            params.set_search_options(do_sample=False, max_length=self._capacity)
            if schema is not None:
                params.set_guidance("json_schema", json.dumps({**schema, **COMPACT}), True)
            self._generator = og.Generator(self._model, params)
        self._generator.append_tokens(np.array(ids[shared:], np.int32))
        return shared

    def _answer_batch(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        began = time.perf_counter()
        longest = max(map(len, prompts))
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=longest + max_tokens, batch_size=len(prompts))
        generator = og.Generator(self._model, params)
        pad = min(self._ends)
        generator.append_tokens(np.array([[pad] * (longest - len(ids)) + ids for ids in prompts], np.int32))
        first_s = 0.0
        for _ in range(max_tokens):
            generator.generate_next_token()
            first_s = first_s or time.perf_counter() - began
        total_s = time.perf_counter() - began
        rows = [[int(token) for token in generator.get_sequence(row)[longest:]] for row in range(len(prompts))]
        answers = [{"tokens": row, "cached": 0, "first_s": first_s, "total_s": total_s} for row in rows]
        return {"answers": answers, "wall_s": total_s}


def _shared(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def main() -> None:
    """Load, then answer line by line until stdin ends."""
    options = json.loads(sys.argv[1])
    worker = Worker(options["model"], options["threads"], options["ends"])
    print(json.dumps({"ready": og.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
