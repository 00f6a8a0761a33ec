"""Tokenizing, detokenizing and templating over a real server, with the field names of llama.cpp and vLLM."""

from typing import Any

import pytest

from tests.fakes import MODEL_NAME
from tests.serving import Served

MESSAGES = [{"role": "user", "content": "Hi <|im_end|>"}]
PROMPT = "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
both_paths = pytest.mark.parametrize("prefix", ["", "/v1"])


def post(server: Served, path: str, **body: Any) -> dict[str, Any]:
    response = server.client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@both_paths
@pytest.mark.parametrize("name", ["content", "prompt"])
def test_a_text_has_tokens(server: Served, prefix: str, name: str) -> None:
    answer = post(server, f"{prefix}/tokenize", **{name: "Hü<|im_end|>", "model": MODEL_NAME})
    assert answer == {"tokens": [72, 195, 188, 258], "count": 4, "max_model_len": 4096, "token_strs": None}


def test_special_tokens_can_be_text(server: Served) -> None:
    assert post(server, "/tokenize", content="<|im_end|>", parse_special=False)["count"] == len("<|im_end|>")


def test_an_empty_text_has_no_tokens(server: Served) -> None:
    assert post(server, "/tokenize", content="")["tokens"] == []


def test_pieces_are_texts_or_bytes(server: Served) -> None:
    answer = post(server, "/tokenize", content="aü", with_pieces=True, return_token_strs=True)
    assert answer["tokens"] == [{"id": 97, "piece": "a"}, {"id": 195, "piece": [195]}, {"id": 188, "piece": [188]}]
    assert answer["token_strs"] == ["a", "\ufffd", "\ufffd"]


def test_a_conversation_has_tokens(server: Served) -> None:
    answer = post(server, "/tokenize", messages=MESSAGES)
    assert post(server, "/detokenize", tokens=answer["tokens"]) == {"content": PROMPT, "prompt": PROMPT}
    closed = post(server, "/tokenize", messages=MESSAGES, add_generation_prompt=False)
    assert answer["count"] - closed["count"] == len("1assistant\n")


@both_paths
def test_tokens_have_a_text(server: Served, prefix: str) -> None:
    assert post(server, f"{prefix}/detokenize", tokens=[72, 258, 195])["content"] == "H<|im_end|>\ufffd"
    assert post(server, f"{prefix}/detokenize", tokens=[])["content"] == ""


@both_paths
def test_a_conversation_has_a_prompt(server: Served, prefix: str) -> None:
    tools = [{"type": "function", "function": {"name": "valve"}}]
    assert post(server, f"{prefix}/apply-template", messages=MESSAGES)["prompt"] == PROMPT
    assert '"valve"' in post(server, f"{prefix}/apply-template", messages=MESSAGES, tools=tools)["prompt"]
    quiet = post(server, f"{prefix}/apply-template", messages=MESSAGES, enable_thinking=False)["prompt"]
    assert quiet.endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "content"),
        ("/tokenize", {"content": "a", "prompt": "b"}, 400, "content"),
        ("/tokenize", {"content": 3}, 400, "content"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "robot"}]}, 400, "messages"),
        ("/tokenize", {"content": "a", "model": "gpt"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, 400, "tokens"),
        ("/detokenize", {"tokens": [259]}, 400, "tokens"),
        ("/apply-template", {}, 400, "messages"),
        ("/apply-template", {"messages": [{"role": "user", "content": 3}]}, 400, "messages"),
    ],
)
def test_refusals_name_the_field(server: Served, path: str, body: dict[str, Any], status: int, param: str) -> None:
    response = server.client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert response.json()["error"]["hint"]
