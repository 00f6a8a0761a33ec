"""Contestant: qwedge's engine, driven the way the scheduler drives it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from contestant import Job, main
from numpy.typing import NDArray

from edge import __version__
from edge.bundle import read_manifest
from edge.config import EngineSettings
from edge.engine.engine import Engine
from edge.engine.sampler import Sampler, SamplingParams
from edge.loader import DEFAULT_CONTEXT


class Qwedge:
    """One row of an engine with the product's settings, apart from the number of threads."""

    def __init__(self, job: Job) -> None:
        folder = Path(job.model)
        settings = EngineSettings.model_validate({})
        self._manifest = read_manifest(folder)
        self._engine = Engine(
            folder,
            self._manifest,
            slots=settings.slots,
            context=DEFAULT_CONTEXT,
            threads=job.threads,
            prefill_chunk=settings.prefill_chunk,
            spin_us=settings.spin_us,
        )

    def first(self, prompt_ids: Sequence[int], output_tokens: int) -> int:
        """Prefill in chunks, as :meth:`edge.scheduler.Scheduler._prefill` does."""
        del output_tokens
        ids, chunk = np.array(prompt_ids, np.int64), self._engine.prefill_chunk
        self._sampler = Sampler(SamplingParams(), prompt_ids, self._manifest.vocab_size)
        logits: NDArray[np.float32] | None = None
        for past in range(0, len(ids), chunk):
            logits = self._engine.prefill(0, ids[past : past + chunk], past)
        assert logits is not None
        self._past, self._last = len(ids), self._sampler.sample(logits)
        return self._last

    def following(self) -> int:
        """Decode a batch of one."""
        logits = self._engine.decode([0], [self._last], [self._past])
        self._past += 1
        self._last = self._sampler.sample(logits[0])
        return self._last

    def versions(self) -> dict[str, str]:
        """Of qwedge and onnxruntime."""
        return {"qwedge": __version__, "onnxruntime": onnxruntime.__version__}


if __name__ == "__main__":
    main(Qwedge)
