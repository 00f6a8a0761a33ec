"""Contestant: onnxruntime-genai with the model its own builder made. Runs in the peer's environment (peer.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found] # it lives in the peer's environment
from contestant import Job, main


class Genai:
    """One generator; its cache is as long as the sequence will get, which is the best case for it."""

    def __init__(self, job: Job) -> None:
        config = og.Config(job.model)
        threads = {"model": {"decoder": {"session_options": {"intra_op_num_threads": job.threads}}}}
        config.overlay(json.dumps(threads))
        self._model = og.Model(config)

    def first(self, prompt_ids: Sequence[int], output_tokens: int) -> int:
        """Prefill, then choose from the logits that gave."""
        length = len(prompt_ids) + output_tokens + 1
        params = og.GeneratorParams(self._model)
        # A minimal length keeps it from stopping at an eos id.
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        self._generator = og.Generator(self._model, params)
        self._generator.append_tokens(np.array(prompt_ids, np.int32))
        return self.following()

    def following(self) -> int:
        """The next token; the first call after the prefill only chooses, every other one runs the model."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def versions(self) -> dict[str, str]:
        """Of onnxruntime-genai and onnxruntime."""
        return {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}


if __name__ == "__main__":
    main(Genai)
