"""Embeddings over a real server: inputs, pooling, encodings, dimensions, refusals."""

import base64
import struct
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from tests.fakes import HIDDEN_SIZE, MODEL_NAME, FakeEngine
from tests.serving import Served

EMBEDDINGS = "/v1/embeddings"
Serve = Callable[..., Served]


def embed(server: Served, **body: Any) -> dict[str, Any]:
    response = server.client.post(EMBEDDINGS, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def expected(text: bytes, pooling: str = "mean") -> np.ndarray[Any, Any]:
    """The fake engine's hidden states count which of four kinds a byte is."""
    hidden = np.eye(HIDDEN_SIZE)[np.frombuffer(text, np.uint8) % HIDDEN_SIZE]
    vector = hidden.mean(axis=0) if pooling == "mean" else hidden[-1]
    return vector / np.linalg.norm(vector)


def test_a_text_becomes_a_vector_of_length_1(server: Served) -> None:
    answer = embed(server, input="Grüße", model=MODEL_NAME, user="u")
    (entry,) = answer["data"]
    assert (answer["object"], entry["object"], entry["index"], answer["model"]) == ("list", "embedding", 0, MODEL_NAME)
    np.testing.assert_allclose(entry["embedding"], expected("Grüße".encode()), rtol=1e-6)
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ([97, 98], [b"ab"]),
        (["a", "bcd"], [b"a", b"bcd"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
        (["a", [98]], [b"a", b"b"]),
        ([f"{number}" for number in range(40)], [b"%d" % number for number in range(40)]),
    ],
)
def test_batches_and_token_ids(server: Served, value: Any, texts: list[bytes]) -> None:
    answer = embed(server, input=value)
    assert [entry["index"] for entry in answer["data"]] == list(range(len(texts)))
    for entry, text in zip(answer["data"], texts, strict=True):
        np.testing.assert_allclose(entry["embedding"], expected(text), rtol=1e-6)
    assert answer["usage"]["total_tokens"] == sum(map(len, texts))


def test_a_long_input_is_read_in_chunks(server: Served) -> None:
    text = "".join(chr(97 + number % 26) for number in range(1000))
    for pooling in ("mean", "last"):
        (entry,) = embed(server, input=text, pooling=pooling)["data"]
        np.testing.assert_allclose(entry["embedding"], expected(text.encode(), pooling), rtol=1e-5)


def test_base64_is_the_same_in_fewer_bytes(server: Served) -> None:
    plain = embed(server, input="abc")["data"][0]["embedding"]
    coded = embed(server, input="abc", encoding_format="base64")["data"][0]["embedding"]
    assert list(struct.unpack(f"<{HIDDEN_SIZE}f", base64.b64decode(coded))) == pytest.approx(plain)


def test_fewer_dimensions_have_length_1_again(server: Served) -> None:
    whole = np.array(embed(server, input="abca")["data"][0]["embedding"])
    fewer = embed(server, input="abca", dimensions=2)["data"][0]["embedding"]
    np.testing.assert_allclose(fewer, whole[:2] / np.linalg.norm(whole[:2]), rtol=1e-6)
    assert embed(server, input="c", dimensions=1)["data"][0]["embedding"] == [0.0]


def test_special_tokens_in_a_text_are_text(server: Served) -> None:
    assert embed(server, input="<|im_end|>")["usage"]["total_tokens"] == len("<|im_end|>")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": None}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [300]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": ["a", [2**64]]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": HIDDEN_SIZE + 1}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
    ],
)
def test_refusals_name_the_field(server: Served, body: dict[str, Any], param: str) -> None:
    response = server.client.post(EMBEDDINGS, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert response.json()["error"]["hint"]


def test_an_input_that_is_too_long_is_400(serve: Serve) -> None:
    server = serve(FakeEngine(context_length=128))
    error = _error(server.client.post(EMBEDDINGS, json={"input": ["short", "x" * 129]}))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert embed(server, input="x" * 128)["usage"]["total_tokens"] == 128


def test_another_model_is_404(server: Served) -> None:
    assert server.client.post(EMBEDDINGS, json={"input": "a", "model": "ada"}).status_code == 404


def test_a_bundle_without_hidden_states_says_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    manifest = server.service.model.manifest.model_copy(update={"hidden_size": None})
    monkeypatch.setitem(vars(server.service.model), "manifest", manifest)
    error = _error(server.client.post(EMBEDDINGS, json={"input": "a"}))
    assert "embeddings" in error["message"]
    assert "export" in error["hint"]


def test_an_engine_failure_is_500(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setattr(server.engine, "embed", lambda *_: np.full((1, HIDDEN_SIZE), np.nan))
    assert server.client.post(EMBEDDINGS, json={"input": "a"}).status_code == 500
    monkeypatch.undo()
    assert embed(server, input="a")["data"]


def _error(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400
    error: dict[str, Any] = response.json()["error"]
    return error
