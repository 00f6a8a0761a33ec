"""Each API's own library with the real demo model."""

from __future__ import annotations

import json

import anthropic
import ollama
import openai
import pytest

from tests.clients.script import CITY, WEATHER

pytestmark = pytest.mark.model
COLOURS = [{"role": "user", "content": "Which colour has the sky on a clear day? Answer with one word."}]
WEATHER_IN_OSLO = [{"role": "user", "content": "Use the tool to look up the weather in Oslo."}]
FORM = [{"role": "user", "content": "Describe Berlin as JSON with its name and its population."}]
Demo = tuple[str, str]


def test_openai(demo: Demo) -> None:
    url, model = demo
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        answer = client.chat.completions.create(model=model, messages=COLOURS, temperature=0, max_tokens=20)
        assert "blue" in (answer.choices[0].message.content or "").lower()
        function = {"name": "get_weather", "description": "Look up the weather of a city", "parameters": WEATHER}
        called = client.chat.completions.create(
            model=model,
            messages=WEATHER_IN_OSLO,
            temperature=0,
            tools=[{"type": "function", "function": function}],
            tool_choice="required",
        )
        (call,) = called.choices[0].message.tool_calls
        assert json.loads(call.function.arguments).keys() == {"city"}


def test_anthropic(demo: Demo) -> None:
    url, model = demo
    with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as client:
        greedy = {"temperature": 0}
        with client.messages.stream(model=model, max_tokens=20, messages=COLOURS, extra_body=greedy) as stream:
            assert "blue" in "".join(stream.text_stream).lower()
        tool = {"name": "get_weather", "description": "Look up the weather of a city", "input_schema": WEATHER}
        called = client.messages.create(
            model=model, max_tokens=100, messages=WEATHER_IN_OSLO, tools=[tool], tool_choice={"type": "any"}
        )
        assert called.stop_reason == "tool_use"
        assert called.content[-1].input.keys() == {"city"}


def test_ollama(demo: Demo) -> None:
    url, model = demo
    options = {"temperature": 0, "num_predict": 60}
    with ollama.Client(host=url) as client:
        answer = client.chat(model=f"{model}:latest", messages=COLOURS, options=options)
        assert "blue" in (answer.message.content or "").lower()
        form = client.chat(model=f"{model}:latest", messages=FORM, format=CITY, options=options)
        assert json.loads(form.message.content or "").keys() == {"name", "population"}
