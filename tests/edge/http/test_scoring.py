"""Log-probabilities of prompts over HTTP, on a real model, against a plain log-softmax of another runtime's logits.

The bodies of the requests, and how the answers are read, are those of lm-eval's ``local-completions`` model [1].

[1] https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/models/openai_completions.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import Manifest, read_manifest
from edge.config import load_settings
from edge.loader import load_service
from edge.service import Service
from edge.settings.server import ServerSettings
from export.oracle import Decoder
from tests.export import tiny
from tests.serving import serving
from tests.tiny_bundles import export_tiny

PATH = "/v1/completions"
TOLERANCE = 2e-5
TEXT = "hello wörld <|im_start|>user\n日本 hello<|im_end|>"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scoring")
    export_tiny(folder, tiny.qwen2_config())
    return folder / "bundle"


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.fixture(scope="module")
def service(bundle: Path, manifest: Manifest) -> Service:
    options = {"SLOTS": 2, "CONTEXT": 96, "PREFILL_CHUNK": 16, "THREADS": 1}
    env = {f"QWEDGE_ENGINE_{name}": str(value) for name, value in options.items()}
    return load_service(bundle, manifest, load_settings(env=env))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with (
        serving(service, ServerSettings(port=0)) as (host, port),
        httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client,
    ):
        yield client


@pytest.fixture
def expected(bundle: Path, manifest: Manifest) -> Any:
    """``expected(ids)``: log-probabilities [n - 1, vocab] of what follows each token but the last."""

    def compute(ids: list[int]) -> NDArray[np.float64]:
        logits = Decoder(bundle).append(np.array(ids))[:-1, : manifest.vocab_size].astype(np.float64)
        peaks = logits.max(axis=1, keepdims=True)
        result: NDArray[np.float64] = logits - peaks - np.log(np.exp(logits - peaks).sum(axis=1, keepdims=True))
        return result

    return compute


def random_ids(length: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, tiny.NUM_IDS, length).tolist()
    return ids


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 70, 96])
def test_a_prompt_is_scored(client: httpx.Client, service: Service, expected: Any, length: int) -> None:
    ids = random_ids(length, length)
    body = complete(client, prompt=ids, echo=True, logprobs=5, max_tokens=0)
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    decode = service.model.tokenizer.decode
    assert (choice["text"], choice["finish_reason"]) == (decode(ids, skip_special=False), "length")
    assert logprobs["tokens"] == [decode([i], skip_special=False) for i in ids]
    assert {len(values) for values in logprobs.values()} == {length}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0], logprobs["text_offset"][0]) == (None, None, 0)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == length
    assert (body["usage"]["completion_tokens"], body["usage"]["prompt_tokens_details"]["cached_tokens"]) == (0, 0)
    if length == 1:
        return
    reference = expected(ids)
    chosen = reference[np.arange(length - 1), ids[1:]]
    np.testing.assert_allclose(logprobs["token_logprobs"][1:], chosen, atol=TOLERANCE)
    for row, own, top in zip(reference, chosen, logprobs["top_logprobs"][1:], strict=True):
        best = np.sort(row)[::-1][:5]
        assert max(top.values()) == pytest.approx(best[0], abs=TOLERANCE)
        # Bytes that are no character share one text; the token itself may be a sixth.
        assert all(min(abs(value - other) for other in (*best, own)) < TOLERANCE for value in top.values())


def test_offsets_point_into_the_text(client: httpx.Client) -> None:
    (choice,) = complete(client, prompt=TEXT, echo=True, logprobs=1, max_tokens=4, temperature=0)["choices"]
    assert choice["text"].startswith(TEXT)
    logprobs = choice["logprobs"]
    ends = [*logprobs["text_offset"][1:], len(choice["text"])]
    spelled = [choice["text"][start:end] for start, end in zip(logprobs["text_offset"], ends, strict=True)]
    assert "".join(spelled) == choice["text"]
    whole = [(token, text) for token, text in zip(logprobs["tokens"], spelled, strict=True) if "\ufffd" not in token]
    assert [text for _, text in whole] == [token for token, _ in whole]
    assert {"<|im_start|>", "hello", "ö"} & {token for token, _ in whole} == {"<|im_start|>", "hello"}


def test_the_answer_goes_on_in_the_same_lists(client: httpx.Client, service: Service, expected: Any) -> None:
    ids = random_ids(20, 3)
    plain = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 6, "logprobs": 2}
    (alone,) = complete(client, prompt=ids, **plain)["choices"]
    (echoed,) = complete(client, prompt=ids, echo=True, **plain)["choices"]
    assert echoed["text"] == service.model.tokenizer.decode(ids, skip_special=False) + alone["text"]
    assert echoed["logprobs"]["tokens"][20:] == alone["logprobs"]["tokens"]
    np.testing.assert_allclose(
        echoed["logprobs"]["token_logprobs"][20:], alone["logprobs"]["token_logprobs"], atol=TOLERANCE
    )
    assert echoed["logprobs"]["token_logprobs"][20] == pytest.approx(expected([*ids, 0])[-1].max(), abs=TOLERANCE)


def test_a_stream_says_the_same(client: httpx.Client) -> None:
    body = {"prompt": [TEXT, "hello"], "echo": True, "logprobs": 1, "max_tokens": 5, "seed": 1, "n": 2}
    whole = complete(client, **body)["choices"]
    response = client.post(PATH, json={**body, "stream": True})
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    parts = [json.loads(line)["choices"][0] for line in lines]
    for choice in whole:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            joined = [value for part in own for value in part["logprobs"][name]]
            if name == "token_logprobs":
                assert joined[1:] == pytest.approx(values[1:], abs=TOLERANCE)
            elif name != "top_logprobs":
                assert joined == values


def test_a_scored_prompt_is_scored_again(client: httpx.Client) -> None:
    body = {"prompt": random_ids(40, 5), "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    first = complete(client, **body)
    complete(client, **{**body, "echo": False})
    again = complete(client, **body)
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_an_echo_without_log_probabilities(client: httpx.Client) -> None:
    (choice,) = complete(client, prompt="hello", echo=True, max_tokens=0)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("hello", None)


def scored_by_lm_eval(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """Sum of the continuation's log-probabilities, and whether it is what greedy decoding says."""
    results = []
    for choice, length in zip(sorted(answer["choices"], key=lambda c: c["index"]), context_lengths, strict=True):
        tokens = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        results.append((sum(tokens), all(own == max(top.values()) for own, top in zip(tokens, tops, strict=True))))
    return results


def lm_eval_loglikelihood(manifest: Manifest, prompt: Any) -> dict[str, Any]:
    return {
        "model": manifest.name,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def test_lm_evals_loglikelihood(client: httpx.Client, manifest: Manifest, expected: Any) -> None:
    prompts = [random_ids(length, 40 + length) for length in (9, 30, 95)]
    for _ in range(3):  # the first continuation is what the model itself says
        prompts[0].append(int(expected([*prompts[0], 0])[-1].argmax()))
    context_lengths = [9, 21, 94]
    answer = complete(client, **lm_eval_loglikelihood(manifest, prompts))
    results = scored_by_lm_eval(answer, context_lengths)
    assert [greedy for _, greedy in results] == [True, False, False]
    for ids, length, (total, _) in zip(prompts, context_lengths, results, strict=True):
        reference = expected(ids)[np.arange(len(ids) - 1), ids[1:]]
        assert total == pytest.approx(reference[length - 1 :].sum(), abs=1e-3)


@pytest.mark.parametrize("batched", [True, False])
def test_lm_evals_loglikelihood_of_text(client: httpx.Client, manifest: Manifest, batched: bool, expected: Any) -> None:
    prompt = ["hello world", "world hello"] if batched else "hello world"
    answer = complete(client, **lm_eval_loglikelihood(manifest, prompt))
    results = scored_by_lm_eval(answer, [1] * (2 if batched else 1))
    tokens = answer["choices"][0]["logprobs"]["tokens"][:-1]
    assert tokens == ["hello", " wor", "ld"]
    ids = [tiny.vocab()[token.replace(" ", "Ġ")] for token in tokens]
    assert results[0][0] == pytest.approx(expected(ids)[[0, 1], ids[1:]].sum(), abs=1e-4)


def test_the_lists_have_their_length_also_where_the_model_ends_at_once(
    client: httpx.Client, manifest: Manifest, expected: Any
) -> None:
    ids = random_ids(12, 8)
    body = {**lm_eval_loglikelihood(manifest, [ids]), "logit_bias": {str(tiny.EOS): 100}}
    answer = complete(client, **body)
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 1)
    assert {len(values) for values in choice["logprobs"].values()} == {13}
    assert choice["logprobs"]["tokens"][-1] == "<|im_end|>"
    reference = expected([*ids, tiny.EOS])
    assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(reference[-1, tiny.EOS], abs=TOLERANCE)
    assert scored_by_lm_eval(answer, [4])[0][0] == pytest.approx(reference[np.arange(3, 11), ids[4:]].sum(), abs=1e-3)


def test_lm_evals_generation(client: httpx.Client, manifest: Manifest) -> None:
    prompts = [random_ids(length, length) for length in (5, 40, 5)]
    shared = {
        "model": manifest.name,
        "max_tokens": 8,
        "temperature": 0,
        "stop": ["\n\n", "<|im_end|>"],
        "seed": 1234,
    }
    answer = complete(client, prompt=prompts, **shared)
    texts = [choice["text"] for choice in sorted(answer["choices"], key=lambda c: c["index"])]
    assert texts == [complete(client, prompt=ids, **shared)["choices"][0]["text"] for ids in prompts]
    assert texts[0] == texts[2]
    assert answer["usage"]["prompt_tokens"] == 50


def test_choices_have_seeds_of_their_own(client: httpx.Client) -> None:
    shared = {"prompt": "hello world", "max_tokens": 12, "temperature": 1.5, "top_p": 1.0, "top_k": 0}
    several = [choice["text"] for choice in complete(client, **shared, n=4, seed=7)["choices"]]
    assert several == [complete(client, **shared, seed=7 + i)["choices"][0]["text"] for i in range(4)]
    assert len(set(several)) > 1
    assert len({choice["text"] for choice in complete(client, **shared, n=4)["choices"]}) > 1


def test_choices_share_their_prompt(client: httpx.Client) -> None:
    ids = random_ids(60, 77)
    body = complete(client, prompt=ids, max_tokens=2, n=2, temperature=0)
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (60, 4)
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    second = body["choices"][1]["timings"]
    num_read = second["prefill_tokens_per_second"] * second["prefill_ms"] / 1000
    assert num_read < 16


@pytest.mark.parametrize("length", [97, 300])
def test_a_prompt_beyond_the_context_is_refused(client: httpx.Client, length: int) -> None:
    response = client.post(PATH, json={"prompt": [5] * length, "echo": True, "logprobs": 1, "max_tokens": 0})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_full_context_leaves_no_room_for_a_token(client: httpx.Client) -> None:
    response = client.post(PATH, json={"prompt": [5] * 96, "echo": True, "logprobs": 1, "max_tokens": 1})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_ids_without_a_token_can_be_scored(client: httpx.Client, manifest: Manifest) -> None:
    padding = manifest.padded_vocab_size - 1
    assert padding >= manifest.vocab_size
    (choice,) = complete(client, prompt=[5, padding, 6], echo=True, logprobs=0, max_tokens=0)["choices"]
    assert choice["logprobs"]["token_logprobs"][:2] == [None, -9999.0]
    assert choice["logprobs"]["token_logprobs"][2] < 0
    assert choice["logprobs"]["tokens"][1] == ""
