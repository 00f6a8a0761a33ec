"""What the model of these tests answers, and what is asked of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fakes import SPECIAL_TOKENS, last_user_message

FACTS = tuple(
    fact["question"] + fact["choices"][fact["answer"]]
    for fact in map(json.loads, (Path(__file__).parent / "lm_eval" / "capitals.jsonl").read_text().splitlines())
)
"""Sentences that the model knows."""

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
"""Arguments of the tool ``get_weather``."""
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["name", "population"],
    "additionalProperties": False,
}
"""The form of an answer."""
A_CITY = {"name": "Köln", "population": 1087353}
QUESTION_OF_WEATHER = "What is the weather in Köln?"
QUESTION_OF_FORM = "Describe a city in JSON."
QUESTION_OF_LENGTH = "Tell a long story."


def reply(prompt: str) -> str:
    """The rest of a fact; a call for the weather, until its result is there; a city; a long story; or an echo."""
    question = last_user_message(prompt)
    begun = prompt.removeprefix(SPECIAL_TOKENS[-1])
    for fact in FACTS:
        if begun and fact.startswith(begun):
            return fact.removeprefix(begun)
    if "<|im_start|>tool" in prompt:
        result = prompt.rsplit("<|im_start|>tool\n", 1)[-1].split("<|im_end|>", 1)[0]
        return f"It is {result}."
    if QUESTION_OF_WEATHER in question:
        return '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    if QUESTION_OF_FORM in question:
        return json.dumps(A_CITY, ensure_ascii=False)
    if QUESTION_OF_LENGTH in question:
        return "x" * 3000
    return f"You said: {question}"
