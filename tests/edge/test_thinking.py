"""Thinking first: budgets to the token, and a form for what follows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from edge.engine.thinking import Thinking, ThoughtsFirst
from edge.service import Service
from edge.tokenizer import Tokenizer
from tests.answers import answer_body
from tests.fakes import CHAT_TEMPLATE, EOS_ID, VOCAB_SIZE, FakeEngine, byte_tokenizer, make_service

ALWAYS = CHAT_TEMPLATE.replace("{% if enable_thinking is defined and not enable_thinking %}", "<think>\n{% if false %}")
SWITCHABLE = CHAT_TEMPLATE
NEVER = CHAT_TEMPLATE.replace("enable_thinking is defined and not enable_thinking", "false")
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
FORM = {"response_format": {"type": "json_schema", "json_schema": {"schema": POINT}}}
TOOLS = {"tools": [{"type": "function", "function": {"name": "move", "parameters": POINT}}]}
CALL = '<tool_call>\n{"name": "move", "arguments": {"x": 1}}\n</tool_call>'


@contextmanager
def serving(reply: str, template: str) -> Iterator[Service]:
    service = make_service(FakeEngine(reply=lambda _: reply), template=template)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def ask(reply: str, template: str, **fields: Any) -> dict[str, Any]:
    """The answer of a model that would say ``reply``."""
    with serving(reply, template) as service:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, **fields}
        return answer_body(service, body)


def message(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = body["choices"][0]["message"]
    return found


@pytest.mark.parametrize(("template", "nature"), [(ALWAYS, "always"), (SWITCHABLE, "optional"), (NEVER, "never")])
def test_a_template_shows_whether_its_model_thinks(template: str, nature: str) -> None:
    found = make_service(template=template).model.template
    assert found is not None
    assert found.thinks == nature


@pytest.mark.parametrize("budget", [1, 7, 30])
def test_a_budget_is_exact(budget: int) -> None:
    body = ask("x" * 100, ALWAYS, thinking_budget=budget, max_tokens=60)
    assert message(body)["reasoning_content"] == "x" * budget
    # The end tag is eight tokens here, and one in the vocabularies of models that think.
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": budget + len("</think")}
    assert message(body)["content"].startswith("x")


def test_thoughts_that_end_in_time_stay_as_they_are() -> None:
    body = ask("hm\n</think>\n\n42", ALWAYS, thinking_budget=20)
    assert message(body) == {"role": "assistant", "content": "42", "reasoning_content": "hm"}


def test_no_budget_is_no_thought() -> None:
    assert message(ask("x", ALWAYS, thinking_budget=0, max_tokens=10)).keys() == {"role", "content"}
    assert message(ask("x", ALWAYS, enable_thinking=False, max_tokens=10)).keys() == {"role", "content"}
    assert message(ask("<think>x", SWITCHABLE, thinking_budget=0)) == {"role": "assistant", "content": "<think>x"}


def test_a_budget_makes_a_switchable_model_think() -> None:
    body = ask("x" * 100, SWITCHABLE, thinking_budget=5, max_tokens=40)
    assert message(body)["reasoning_content"].strip("<think>\n") == "x" * 5


def test_a_model_that_never_thinks_needs_no_budget() -> None:
    assert message(ask("42", NEVER, thinking_budget=5, enable_thinking=True))["content"] == "42"


def test_thoughts_without_an_end_are_reasoning() -> None:
    body = ask("on and on", ALWAYS)
    assert message(body) == {"role": "assistant", "content": "", "reasoning_content": "on and on"}
    cut = ask("on and on", ALWAYS, max_tokens=5)
    assert (message(cut)["reasoning_content"], cut["choices"][0]["finish_reason"]) == ("on an", "length")


class TestForms:
    @pytest.mark.parametrize(
        ("template", "said", "fields"),
        [
            (ALWAYS, 'hm {</think>\n\n{"x": 3}', {}),
            (ALWAYS, 'hm {</think>{"x": 3}', {}),
            (SWITCHABLE, '<think>\nhm {</think>\n\n{"x": 3}', {"enable_thinking": True}),
            (ALWAYS, "hm {</think>\n\nSure!", {}),
        ],
    )
    def test_come_after_thoughts(self, template: str, said: str, fields: dict[str, Any]) -> None:
        found = message(ask(said, template, **FORM, **fields))
        assert found["reasoning_content"] == "hm {"
        assert json.loads(found["content"]).keys() == {"x"}

    def test_come_after_a_budget(self) -> None:
        found = message(ask("thinking without an end", ALWAYS, thinking_budget=8, **FORM))
        assert found["reasoning_content"] == "thinking"
        assert json.loads(found["content"]).keys() == {"x"}

    def test_come_at_once_unless_thoughts_are_asked_for(self) -> None:
        found = message(ask("<think>hm</think>", SWITCHABLE, **FORM))
        assert json.loads(found["content"]).keys() == {"x"}
        assert "reasoning_content" not in found

    def test_come_at_once_where_thinking_is_switched_off(self) -> None:
        found = message(ask("whatever", ALWAYS, enable_thinking=False, **FORM))
        assert found.keys() == {"role", "content"}
        assert json.loads(found["content"]).keys() == {"x"}

    def test_are_waited_for(self) -> None:
        body = ask("hm", ALWAYS, max_tokens=20, **FORM)
        # The end of the answer is no way out of the thoughts.
        assert body["choices"][0]["finish_reason"] == "length"


class TestTools:
    @pytest.mark.parametrize("template", [ALWAYS, SWITCHABLE])
    def test_a_call_in_the_thoughts_is_none(self, template: str) -> None:
        opening = "" if template == ALWAYS else "<think>\n"
        found = message(ask(f"{opening}maybe <tool_call>f? No.</think>\n\n{CALL}", template, **TOOLS))
        assert found["reasoning_content"] == "maybe <tool_call>f? No."
        assert [call["function"]["name"] for call in found["tool_calls"]] == ["move"]

    def test_a_model_need_not_think(self) -> None:
        assert message(ask("<b>Hello</b>", SWITCHABLE, **TOOLS))["content"] == "<b>Hello</b>"
        assert message(ask(CALL, SWITCHABLE, **TOOLS))["tool_calls"]

    def test_a_forced_call_after_thoughts(self) -> None:
        found = message(ask("hm</think>no", ALWAYS, **TOOLS, tool_choice="required"))
        assert found["reasoning_content"] == "hm"
        (call,) = found["tool_calls"]
        assert json.loads(call["function"]["arguments"]).keys() == {"x"}


class TestMask:
    """Without an engine."""

    def make(self, thinking: Thinking) -> ThoughtsFirst:
        return ThoughtsFirst(thinking, Tokenizer(byte_tokenizer()), frozenset({EOS_ID}), None)

    def test_forced_tokens_are_the_only_ones_left(self) -> None:
        mask = self.make(Thinking("given", 0))
        logits = np.zeros(VOCAB_SIZE, np.float32)
        text = b""
        while forced := mask.forced_tokens():
            allowed = np.flatnonzero(np.isfinite(mask.mask(logits)))
            assert allowed.tolist() == forced[:1]
            mask.accept(forced[0])
            text += bytes(forced[:1])
        assert text == b"</think>"
        assert np.isfinite(mask.mask(logits)).all()

    def test_the_logits_stay_as_they_are(self) -> None:
        logits = np.arange(VOCAB_SIZE, dtype=np.float32)
        mask = self.make(Thinking("given", 3))
        mask.mask(logits)[:] = 7
        assert logits.tolist() == list(range(VOCAB_SIZE))

    def test_a_tag_that_the_budget_cuts_in_two_is_written_again(self) -> None:
        mask = self.make(Thinking("given", 3))
        for byte in b"</t":
            mask.accept(byte)
        assert bytes(mask.forced_tokens()) == b"</think>"
