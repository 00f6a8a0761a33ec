"""Log-probabilities against a plain log-softmax, and their way to the wire."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge.engine.logprobs import PromptScorer, token_logprobs
from edge.engine.sampler import Sampler, SamplingParams
from edge.errors import EngineError
from edge.openai import Answer, parse_chat, parse_completion, prepare
from edge.service import Delta, Service, events
from tests.fakes import VOCAB_SIZE, FakeEngine, make_service

SAID = "Tür\n"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    return values - values.max() - math.log(np.exp(values - values.max()).sum())


@pytest.mark.parametrize("scale", [0.01, 3.0, 300.0])
def test_they_are_the_log_softmax(scale: float) -> None:
    logits = np.random.default_rng(0).normal(scale=scale, size=151_665).astype(np.float32)
    expected = log_softmax(logits)
    result = token_logprobs(logits, 77, 20)
    assert result.token_id == 77
    assert result.logprob == pytest.approx(max(expected[77], -9999), rel=1e-6)
    assert [token_id for token_id, _ in result.top] == np.argsort(-logits, kind="stable")[:20].tolist()
    assert [value for _, value in result.top] == pytest.approx([expected[i] for i, _ in result.top], abs=1e-5)


def test_the_impossible_has_a_finite_value() -> None:
    logits = np.array([3e38, -3e38, -np.inf, 0], np.float32)
    assert token_logprobs(logits, 2, 4).logprob == -9999.0
    assert [value for _, value in token_logprobs(logits, 0, 4).top] == [0.0, -9999.0, -9999.0, -9999.0]


def test_they_are_the_models_own_whatever_the_sampling() -> None:
    logits = np.random.default_rng(1).normal(size=500).astype(np.float32)
    params = SamplingParams(temperature=0.3, top_k=3, presence_penalty=2.0, logit_bias={5: 100.0}, seed=1)
    sampler = Sampler(params, [], 490, num_logprobs=2)
    tokens = [sampler.sample(logits) for _ in range(3)]
    expected = log_softmax(logits[:490])
    for token_id in tokens:  # in the order they were sampled, also where a step gave several
        logprobs = sampler.take_logprobs()
        assert logprobs is not None
        assert logprobs.token_id == token_id
        assert logprobs.logprob == pytest.approx(expected[token_id], abs=1e-5)
        assert logprobs.top[0] == (int(expected.argmax()), pytest.approx(expected.max(), abs=1e-5))
    assert sampler.take_logprobs() is None


def test_a_prompt_is_scored_in_chunks_of_any_size() -> None:
    ids = [5, 3, 3, 9, 0, 11, 2]
    logits = np.random.default_rng(2).normal(scale=3, size=(len(ids), 16)).astype(np.float32)
    expected = [log_softmax(row[:12])[token_id] for row, token_id in zip(logits, ids[1:], strict=False)]
    for sizes in ([7], [1] * 7, [2, 3, 2]):
        scorer = PromptScorer(ids, 12, 2)
        start = 0
        for size in sizes:
            scorer(start, logits[start : start + size].copy())
            start += size
        assert [score.token_id for score in scorer.scores] == ids[1:]
        assert [score.logprob for score in scorer.scores] == pytest.approx(expected, abs=1e-5)
        assert [score.top[0][0] for score in scorer.scores] == logits[:-1, :12].argmax(axis=1).tolist()


def test_a_prompt_that_is_read_again_is_scored_once() -> None:
    logits = np.random.default_rng(3).normal(size=(4, 8)).astype(np.float32)
    scorer = PromptScorer([1, 2, 3, 4], 8, 0)
    scorer(0, logits[:2])
    scorer(0, logits)
    assert [score.token_id for score in scorer.scores] == [2, 3, 4]


def test_a_single_token_has_nothing_before_it() -> None:
    scorer = PromptScorer([1], 8, 3)
    scorer(0, np.zeros((1, 8), np.float32))
    assert scorer.scores == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    logits = np.zeros((2, 8), np.float32)
    logits[0, 3] = bad
    with pytest.raises(EngineError, match="not finite"):
        PromptScorer([1, 2], 8, 1)(0, logits)


def test_nothing_is_recorded_unasked() -> None:
    sampler = Sampler(SamplingParams(), [], 4)
    sampler.sample(np.zeros(4, np.float32))
    assert sampler.take_logprobs() is None


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = make_service(FakeEngine(reply=lambda _: SAID))
    service.start()
    yield service
    service.stop()


def ask(service: Service, body: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The choice of the whole answer, and those of its chunks."""
    request = parse_completion(body) if "prompt" in body else parse_chat(body)
    generations = prepare(service.model, request)
    answer = Answer(service.model, request, generations)
    chunks: list[dict[str, Any]] = []

    async def collect() -> None:
        async for index, event in events(service, generations):
            assert not isinstance(event, Delta) or (event.logprobs is None) == (request.num_logprobs is None)
            chunks.extend(answer.chunks(index, event))

    asyncio.run(collect())
    json.dumps([answer.body(), chunks], allow_nan=False)
    return answer.body()["choices"][0], [chunk["choices"][0] for chunk in chunks]


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], **fields}


def test_chat(service: Service) -> None:
    choice, chunks = ask(service, chat(logprobs=True, top_logprobs=2))
    content = choice["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == SAID
    assert [entry["token"] for entry in content] == ["T", "\ufffd", "\ufffd", "r", "\n"]
    assert all(entry["logprob"] == pytest.approx(0.0, abs=1e-6) for entry in content)
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in content)
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert [entry for chunk in chunks for entry in chunk["logprobs"]["content"]] == content


def test_chunks_carry_the_tokens_of_their_text(service: Service) -> None:
    _, chunks = ask(service, chat(logprobs=True))
    for chunk in chunks:
        raw = bytes(byte for entry in chunk["logprobs"]["content"] for byte in entry["bytes"])
        assert raw.decode() == chunk["delta"].get("content", "")


def test_completions(service: Service) -> None:
    choice, chunks = ask(service, {"prompt": "Hi", "logprobs": 3})
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["T", "\ufffd", "\ufffd", "r", "\n", "<|im_end|>"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 6
    assert [len(top) for top in logprobs["top_logprobs"]] == [3] * 6
    assert max(logprobs["top_logprobs"][0], key=logprobs["top_logprobs"][0].get) == "T"
    assert [offset for chunk in chunks for offset in chunk["logprobs"]["text_offset"]] == logprobs["text_offset"]


def test_the_token_itself_is_always_among_its_alternatives(service: Service) -> None:
    choice, _ = ask(service, {"prompt": "Hi", "logprobs": 1, "guided_choice": ["x"]})
    top = choice["logprobs"]["top_logprobs"][0]
    assert list(top) == ["x", "T"]
    assert top["x"] == choice["logprobs"]["token_logprobs"][0] < top["T"]
    choice, _ = ask(service, {"prompt": "Hi", "logprobs": 0})
    assert list(choice["logprobs"]["top_logprobs"][0]) == ["T"]


def test_alternatives_are_the_models_not_the_grammars(service: Service) -> None:
    choice, _ = ask(service, chat(logprobs=True, top_logprobs=1, guided_choice=["x"]))
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["top_logprobs"][0]["token"]) == ("x", "T")
    assert entry["logprob"] == pytest.approx(-1000 - math.log1p((VOCAB_SIZE - 1) * math.exp(-1000)), abs=1e-3)


@pytest.mark.parametrize("body", [chat(), chat(logprobs=False), {"prompt": "Hi"}])
def test_unasked_there_are_none(service: Service, body: dict[str, Any]) -> None:
    choice, chunks = ask(service, body)
    assert [choice["logprobs"], *(chunk["logprobs"] for chunk in chunks)] == [None] * (len(chunks) + 1)
