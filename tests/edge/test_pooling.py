"""Vectors of whole texts, over the real engine and through the service."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.engine.engine import Engine
from edge.engine.pooling import Pooler, Pooling
from edge.engine.sampler import SamplingParams
from edge.errors import EngineError, RequestError
from edge.service import Failed, Finished, GenerationRequest, Pooled
from tests.edge.test_scheduler import Client, running
from tests.export.tiny import qwen3_config
from tests.fakes import FakeEngine, make_service
from tests.tiny_bundles import export_tiny

PROMPT = np.arange(3, 40, dtype=np.int64)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("pooling")
    manifest = export_tiny(folder, qwen3_config())
    return Engine(folder / "bundle", manifest, slots=2, context=64, threads=1, prefill_chunk=16)


def embed(engine: Engine, slot: int, sizes: list[int]) -> NDArray[np.float32]:
    """Hidden states of :data:`PROMPT`, read in pieces of these sizes."""
    assert sum(sizes) == len(PROMPT)
    ends = np.cumsum(sizes)
    spans = zip(ends - sizes, ends, strict=True)
    return np.concatenate([engine.embed(slot, PROMPT[start:end], int(start)).copy() for start, end in spans])


def test_hidden_states_do_not_depend_on_the_cut(engine: Engine) -> None:
    whole = embed(engine, 0, [16, 16, 5])
    assert whole.shape == (len(PROMPT), engine.manifest.hidden_size)
    np.testing.assert_allclose(embed(engine, 1, [1, 7, 16, 13]), whole, atol=1e-5)


def test_an_answer_may_follow_on_what_was_read(engine: Engine) -> None:
    embed(engine, 0, [16, 16, 5])
    after = engine.decode([0], [7], [len(PROMPT)]).copy()
    for start in range(0, len(PROMPT), 16):
        engine.prefill(1, PROMPT[start : start + 16], start)
    np.testing.assert_allclose(engine.decode([1], [7], [len(PROMPT)]), after, atol=1e-4)


def test_the_mean_counts_every_token_once() -> None:
    pooler = Pooler("mean")
    hidden = np.arange(15, dtype=np.float32).reshape(5, 3)
    pooler(0, hidden[:2])  # is read again from the start, as after a loss of its slot
    for start, end in ((0, 2), (2, 3), (3, 5)):
        pooler(start, hidden[start:end])
    np.testing.assert_array_equal(pooler.vector, hidden.mean(axis=0))


def test_the_last_token_alone_can_count() -> None:
    pooler = Pooler("last")
    pooler(0, np.zeros((4, 3), np.float32))
    pooler(4, np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(pooler.vector, np.ones(3))


def test_a_vector_that_is_not_finite_is_an_error() -> None:
    pooler = Pooler("mean")
    pooler(0, np.full((1, 3), np.inf, np.float32))
    with pytest.raises(EngineError, match="not finite"):
        _ = pooler.vector


@pytest.mark.parametrize(("pooling", "expected"), [("mean", [0.25, 0.5, 0.25, 0.0]), ("last", [0.0, 1.0, 0.0, 0.0])])
def test_the_service_gives_a_vector_and_no_text(pooling: Pooling, expected: list[float]) -> None:
    with running(FakeEngine(), prefix_cache_bytes=1 << 20) as service:
        for _ in range(2):  # the second time nothing is found in the cache
            client = Client(service, "DEFI" * 16, max_tokens=0, pooling=pooling)
            end = client.end()
            assert isinstance(end, Finished)
            assert end.timings.num_cached_tokens == 0
            vector = next(event.vector for event in client.events if isinstance(event, Pooled))
            np.testing.assert_array_equal(vector, expected)


def test_a_vector_that_is_not_finite_ends_in_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        FakeEngine, "embed", lambda _self, _slot, ids, _past: np.full((len(ids), 4), np.nan, np.float32)
    )
    with running(FakeEngine()) as service:
        end = Client(service, max_tokens=0, pooling="mean").end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, EngineError)


def test_a_bundle_without_hidden_states_says_so() -> None:
    service = make_service(FakeEngine())
    object.__setattr__(service.model, "manifest", service.model.manifest.model_copy(update={"hidden_size": None}))
    service.start()
    with pytest.raises(RequestError, match="makes no embeddings"):
        service.submit(GenerationRequest((1,), SamplingParams(), max_tokens=0, pooling="mean"), lambda _: None)
    service.stop()
