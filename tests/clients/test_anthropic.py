"""Anthropic's own library for Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import anthropic
import pytest

from tests.clients.script import A_CITY, CITY, QUESTION_OF_FORM, QUESTION_OF_LENGTH, QUESTION_OF_WEATHER, WEATHER
from tests.fakes import MODEL_NAME
from tests.serving import Served

HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"name": "get_weather", "description": "The weather", "input_schema": WEATHER}]


@pytest.fixture
def client(server: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as made:
        yield made


def test_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model=MODEL_NAME, max_tokens=100, system="Be brief.", messages=HI)
    assert [block.text for block in message.content if block.type == "text"] == ["You said: Hi"]
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 13)


def test_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model=MODEL_NAME, max_tokens=100, messages=HI, stop_sequences=[" Hi"]) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == "You said:"
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", " Hi")
    assert final.usage.output_tokens > 0


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool(client: anthropic.Anthropic, choice: dict[str, str], *, streamed: bool) -> None:
    messages = [{"role": "user", "content": QUESTION_OF_WEATHER}]
    wanted = {"model": MODEL_NAME, "max_tokens": 200, "messages": messages, "tools": TOOLS, "tool_choice": choice}
    if streamed:
        with client.messages.stream(**wanted) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(**wanted)
    (call,) = message.content
    assert (call.type, call.name, call.input, message.stop_reason) == (
        "tool_use", "get_weather", {"city": "Köln"}, "tool_use",
    )  # fmt: skip
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(model=MODEL_NAME, max_tokens=100, messages=messages, tools=TOOLS)
    assert answer.content[0].text == "It is sunny."


def test_an_answer_in_a_given_form(client: anthropic.Anthropic) -> None:
    messages = [{"role": "user", "content": QUESTION_OF_FORM}]
    form = {"format": {"type": "json_schema", "schema": CITY}}
    message = client.messages.create(model=MODEL_NAME, max_tokens=100, messages=messages, output_config=form)
    assert json.loads(message.content[0].text) == A_CITY


def test_counting_tokens(client: anthropic.Anthropic) -> None:
    count = client.messages.count_tokens(model=MODEL_NAME, messages=HI, tools=TOOLS).input_tokens
    usage = client.messages.create(model=MODEL_NAME, max_tokens=1, messages=HI, tools=TOOLS).usage
    assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0) > 0


def test_the_models(client: anthropic.Anthropic) -> None:
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == (MODEL_NAME, "model", MODEL_NAME)
    assert client.models.retrieve(MODEL_NAME) == model
    assert model.created_at.year > 2000


def test_errors_have_their_classes(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match=MODEL_NAME):
        client.messages.create(model="claude-opus-4-5", max_tokens=9, messages=HI)
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match="images"):
        client.messages.create(model=MODEL_NAME, max_tokens=9, messages=[{"role": "user", "content": [image]}])


def test_closing_a_stream_ends_the_work(client: anthropic.Anthropic, stops_working: Callable[[], None]) -> None:
    messages = [{"role": "user", "content": QUESTION_OF_LENGTH}]
    with client.messages.stream(model=MODEL_NAME, max_tokens=3000, messages=messages) as stream:
        assert next(iter(stream.text_stream))
    stops_working()
