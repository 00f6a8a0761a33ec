"""The real demo model through the product: exported by its catalog name, served by the real engine.

The bundle of `make model` is used where it is there; else the model is downloaded and exported here, once.
"""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import read_manifest, verify_bundle
from edge.cli import run
from edge.config import load_settings
from edge.engine.sampler import SamplingParams
from edge.loader import load_service
from edge.service import Delta, Event, Failed, Finished, GenerationRequest, Service
from tests.answers import first_choice

NAME = "qwen2.5-coder-0.5b-instruct"
ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 120

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = ROOT / "models" / f"{NAME}-balanced"
    if made.is_dir():
        return made
    folder = tmp_path_factory.mktemp("model") / NAME
    if run(["export", NAME, "-o", str(folder)]) != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("the demo model could not be exported")
        pytest.skip("the demo model cannot be had here")
    return folder


@pytest.fixture(scope="module")
def service(bundle: Path) -> Iterator[Service]:
    service = load_service(bundle, verify_bundle(bundle), load_settings(env={}))
    service.start()
    yield service
    service.stop()


def submit(service: Service, question: str, max_tokens: int = 48) -> queue.SimpleQueue[Event]:
    """A greedy answer's events."""
    ids = service.model.encode_chat([{"role": "user", "content": question}])
    heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
    service.submit(GenerationRequest(ids, SamplingParams(), max_tokens=max_tokens), heard.put)
    return heard


def answer(heard: queue.SimpleQueue[Event]) -> tuple[str, Finished]:
    text = ""
    while True:
        event = heard.get(timeout=TIMEOUT_S)
        assert not isinstance(event, Failed), event
        if isinstance(event, Delta):
            text += event.text
        if isinstance(event, Finished):
            return text + event.text, event


def test_the_manifest_tells_what_was_exported(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert (manifest.name, manifest.model_type, manifest.licence) == (NAME, "qwen2", "apache-2.0")
    assert manifest.parameter_count == 494_032_768
    assert manifest.vocab_size == 151_665
    assert manifest.measured["self_test"]["next_text"] == " Paris"
    assert list(manifest.source.sha256.values()) == ["1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the capital of France? Answer with one word.", "Paris"),
        ("法国的首都是哪里?", "巴黎"),
        ("Write a Python function add(a, b).", "def add(a, b):"),
    ],
)
def test_it_answers_sensibly(service: Service, question: str, expected: str) -> None:
    text, _ = answer(submit(service, question))
    assert expected in text
    assert "\ufffd" not in text


def test_an_answer_does_not_depend_on_what_runs_beside_it(service: Service) -> None:
    questions = ["Count from one to ten.", "Name three colours.", "What is HTTP?", "Write a haiku about rain."]
    alone = [answer(submit(service, question))[0] for question in questions]
    together = [submit(service, question) for question in questions]
    assert [answer(heard)[0] for heard in together] == alone


def test_a_known_beginning_is_not_read_again_and_changes_nothing(service: Service) -> None:
    question = "Explain in two sentences why pumps need valves. " * 3
    cold, first = answer(submit(service, question))
    warm, second = answer(submit(service, question))
    assert first.timings.num_cached_tokens < second.timings.num_cached_tokens
    assert second.timings.num_cached_tokens == second.timings.num_prompt_tokens - 1
    assert warm == cold


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": WEATHER}}]


def choice(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """The first greedy choice of what a client would get."""
    return first_choice(service, {"temperature": 0, "max_tokens": 80, **body})


def test_it_calls_a_tool(service: Service) -> None:
    messages = [{"role": "user", "content": "How warm is it in Cologne, in celsius?"}]
    made = choice(service, {"messages": messages, "tools": TOOLS, "tool_choice": "required"})
    assert made["finish_reason"] == "tool_calls"
    arguments = json.loads(made["message"]["tool_calls"][0]["function"]["arguments"])
    assert arguments == {"city": "Cologne", "unit": "celsius"}


def test_it_fills_a_gap(service: Service) -> None:
    code = {"prompt": "def area_of_circle(radius):\n    ", "suffix": "\n\nprint(area_of_circle(2))\n"}
    filled = choice(service, code)
    assert filled["finish_reason"] == "stop"
    assert filled["text"].startswith("return")
    assert "radius" in filled["text"]
