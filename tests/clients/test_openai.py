"""OpenAI's own library for Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import openai
import pytest
from pydantic import BaseModel

from tests.clients.script import A_CITY, CITY, QUESTION_OF_FORM, QUESTION_OF_LENGTH, QUESTION_OF_WEATHER, WEATHER
from tests.fakes import MODEL_NAME
from tests.serving import Served

HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER, "strict": True}}]


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL_NAME, messages=HI)
    assert answer.choices[0].message.content == "You said: Hi"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 13


def test_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL_NAME, messages=HI, stream_options={"include_usage": True}
    ) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(texts) == len("You said: Hi")
    assert final.choices[0].message.content == "".join(texts) == "You said: Hi"
    assert final.usage is not None


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool(client: openai.OpenAI, choice: object, *, streamed: bool) -> None:
    messages = [{"role": "user", "content": QUESTION_OF_WEATHER}]
    wanted = {"model": MODEL_NAME, "messages": messages, "tools": TOOLS, "tool_choice": choice}
    if streamed:
        with client.chat.completions.stream(**wanted) as stream:
            message = stream.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**wanted).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages += [message.model_dump(include={"role", "content", "tool_calls"}), result]
    answer = client.chat.completions.create(model=MODEL_NAME, messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "It is sunny."


def test_an_answer_in_a_given_form(client: openai.OpenAI) -> None:
    class City(BaseModel):
        name: str
        population: int

    messages = [{"role": "user", "content": QUESTION_OF_FORM}]
    parsed = client.chat.completions.parse(model=MODEL_NAME, messages=messages, response_format=City)
    assert parsed.choices[0].message.parsed == City(**A_CITY)
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    plain = client.chat.completions.create(model=MODEL_NAME, messages=messages, response_format=form)
    assert json.loads(plain.choices[0].message.content or "") == A_CITY


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL_NAME, messages=HI, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert bytes(byte for entry in entries for byte in entry.bytes) == b"You said: Hi"


def test_text_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL_NAME, prompt=["a", "b"], n=2)
    assert [choice.text for choice in answer.choices] == ["You said: a"] * 2 + ["You said: b"] * 2
    scored = client.completions.create(model=MODEL_NAME, prompt="abc", echo=True, logprobs=1, max_tokens=0)
    assert scored.choices[0].logprobs.tokens[:3] == ["a", "b", "c"]  # type: ignore[union-attr, index]


def test_embeddings(client: openai.OpenAI) -> None:
    # The library asks for base64 unless it is told otherwise, and decodes it.
    plain = client.embeddings.create(model=MODEL_NAME, input=["Hi", "Hello"], encoding_format="float")
    packed = client.embeddings.create(model=MODEL_NAME, input=["Hi", "Hello"])
    for one, other in zip(plain.data, packed.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
        assert sum(value * value for value in one.embedding) == pytest.approx(1)


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL_NAME, input="Hi", instructions="Be brief.")
    assert answer.output_text == "You said: Hi"
    with client.responses.stream(model=MODEL_NAME, input="Hi") as stream:
        told = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == told == "You said: Hi"


def test_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL_NAME, messages=HI, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL_NAME, messages=[{"role": "user", "content": "x" * 5000}])
    assert long.value.code == "context_length_exceeded"


def test_closing_a_stream_ends_the_work(client: openai.OpenAI, stops_working: Callable[[], None]) -> None:
    messages = [{"role": "user", "content": QUESTION_OF_LENGTH}]
    stream = client.chat.completions.create(model=MODEL_NAME, messages=messages, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    stream.close()
    stops_working()
