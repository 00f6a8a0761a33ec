"""Ollama's own library for Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import ollama
import pytest

from tests.clients.script import A_CITY, CITY, QUESTION_OF_FORM, QUESTION_OF_LENGTH, QUESTION_OF_WEATHER
from tests.fakes import MODEL_NAME
from tests.serving import Served

TAGGED = f"{MODEL_NAME}:latest"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(server: Served) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as made:
        yield made


def get_weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: where.
    """
    return f"sunny in {city}"


@pytest.mark.parametrize("name", [MODEL_NAME, TAGGED])
def test_a_chat(client: ollama.Client, name: str) -> None:
    answer = client.chat(model=name, messages=HI)
    assert answer.message.content == "You said: Hi"
    assert (answer.done_reason, answer.eval_count) == ("stop", 13)


def test_a_stream(client: ollama.Client) -> None:
    parts = list(client.chat(model=TAGGED, messages=HI, stream=True))
    assert "".join(part.message.content or "" for part in parts) == "You said: Hi"
    assert [part.done for part in parts][-2:] == [False, True]


def test_generate(client: ollama.Client) -> None:
    answer = client.generate(model=TAGGED, prompt="Hi", options={"num_predict": 3, "temperature": 0})
    assert (answer.response, answer.done_reason) == ("You", "length")
    parts = client.generate(model=TAGGED, prompt="Hi", raw=True, stream=True)
    assert "".join(part.response for part in parts) == "You said: Hi"
    assert client.generate(model=TAGGED).done_reason == "load"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool(client: ollama.Client, *, streamed: bool) -> None:
    messages = [{"role": "user", "content": QUESTION_OF_WEATHER}]
    if streamed:
        parts = client.chat(model=TAGGED, messages=messages, tools=[get_weather], stream=True)
        (call,) = [call for part in parts for call in part.message.tool_calls or ()]
    else:
        (call,) = client.chat(model=TAGGED, messages=messages, tools=[get_weather]).message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Köln"})
    result = get_weather(**call.function.arguments)
    messages += [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_name": "get_weather", "content": result},
    ]
    answer = client.chat(model=TAGGED, messages=messages, tools=[get_weather])
    assert answer.message.content == "It is sunny in Köln."


def test_an_answer_in_a_given_form(client: ollama.Client) -> None:
    messages = [{"role": "user", "content": QUESTION_OF_FORM}]
    for form in ("json", CITY):
        answer = client.chat(model=TAGGED, messages=messages, format=form)
        assert json.loads(answer.message.content or "") == A_CITY


def test_embeddings(client: ollama.Client) -> None:
    answer = client.embed(model=TAGGED, input=["Hi", "Hello"])
    lengths = [sum(value * value for value in vector) for vector in answer.embeddings]
    assert lengths == pytest.approx([1, 1])
    assert list(client.embeddings(model=TAGGED, prompt="Hi").embedding) == list(answer.embeddings[0])


def test_the_models(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == [TAGGED]
    shown = client.show(TAGGED)
    assert "completion" in (shown.capabilities or ())
    assert shown.modelinfo["general.architecture"] == "qwen2"
    assert [model.model for model in client.ps().models] == [TAGGED]


def test_errors(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match=MODEL_NAME) as missing:
        client.chat(model="llama3.2", messages=HI)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="text"):
        client.chat(model=TAGGED, messages=[{"role": "user", "content": "x", "images": [b"AAAA"]}])
    with pytest.raises(ollama.ResponseError, match="qwedge install"):
        client.pull("llama3.2")
    with pytest.raises(ollama.ResponseError, match="qwedge install"):
        client.delete(TAGGED)


def test_leaving_a_stream_ends_the_work(client: ollama.Client, stops_working: Callable[[], None]) -> None:
    messages = [{"role": "user", "content": QUESTION_OF_LENGTH}]
    stream = client.chat(model=TAGGED, messages=messages, stream=True)
    assert next(stream).message.content == "x"
    stream.close()
    stops_working()
