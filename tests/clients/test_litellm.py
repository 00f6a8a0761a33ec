"""LiteLLM, over each of the three APIs."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest

from tests.clients.script import A_CITY, CITY, QUESTION_OF_FORM, QUESTION_OF_WEATHER, WEATHER
from tests.fakes import MODEL_NAME
from tests.serving import Served

TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": WEATHER}}]
pytestmark = pytest.mark.filterwarnings("ignore")  # the library warns of its own types
PATHS = {"openai": "/v1", "anthropic": "", "ollama_chat": ""}


def ask(server: Served, provider: str, question: str, **options: Any) -> Any:
    return litellm.completion(
        model=f"{provider}/{MODEL_NAME}",
        api_base=server.url + PATHS[provider],
        api_key="unused",
        messages=[{"role": "user", "content": question}],
        max_tokens=200,
        **options,
    )


@pytest.mark.parametrize("provider", PATHS)
def test_a_chat(server: Served, provider: str) -> None:
    answer = ask(server, provider, "Hi")
    assert answer.choices[0].message.content == "You said: Hi"
    assert answer.usage.completion_tokens == 13


@pytest.mark.parametrize("provider", PATHS)
def test_a_stream(server: Served, provider: str) -> None:
    chunks = list(ask(server, provider, "Hi", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "You said: Hi"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("provider", PATHS)
def test_a_tool(server: Served, provider: str) -> None:
    answer = ask(server, provider, QUESTION_OF_WEATHER, tools=TOOLS)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Köln"})
    assert answer.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("provider", ["openai", "ollama_chat"])
def test_an_answer_in_a_given_form(server: Served, provider: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    answer = ask(server, provider, QUESTION_OF_FORM, response_format=form)
    assert json.loads(answer.choices[0].message.content) == A_CITY


@pytest.mark.parametrize("provider", ["openai", "ollama"])
def test_embeddings(server: Served, provider: str) -> None:
    base = server.url + ("/v1" if provider == "openai" else "")
    answer = litellm.embedding(model=f"{provider}/{MODEL_NAME}", api_base=base, api_key="unused", input=["Hi", "Hello"])
    lengths = [sum(value * value for value in entry["embedding"]) for entry in answer.data]
    assert lengths == pytest.approx([1, 1])


@pytest.mark.parametrize("provider", PATHS)
def test_errors(server: Served, provider: str) -> None:
    with pytest.raises(litellm.exceptions.BadRequestError) as caught:
        ask(server, provider, "x" * 5000)
    assert "4096" in str(caught.value)
