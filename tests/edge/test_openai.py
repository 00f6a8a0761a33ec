"""The OpenAI wire format: bodies, fields, chunks, complete answers, tool calls and reasoning."""

import contextlib
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import EngineError, ModelNotFoundError, OverloadedError, QwedgeError, RequestError
from edge.model import Model
from edge.openai import Answer, error_body, parse_body, parse_chat, parse_completion, prepare
from edge.openai.blocks import BlockParser
from edge.openai.pieces import Arguments, Call, Content, Piece, Reasoning
from edge.sequence import FinishReason, Timings
from edge.service import Delta, Failed, Finished, Queued, Started
from tests.fakes import CHAT_TEMPLATE, MODEL_NAME, make_model

TIMINGS = Timings(
    queue_s=0.5, prefill_s=0.1, decode_s=0.4, num_prompt_tokens=20, num_output_tokens=5, num_cached_tokens=8
)
MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "valve", "description": "opens it", "parameters": {"type": "object"}, "strict": True},
    }
]


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


class TestParseBody:
    def test_reads_an_object(self) -> None:
        assert parse_body(b'{"a": [1, 2.5, "\\u00e4", "\\ud83d\\ude00"]}') == {"a": [1, 2.5, "ä", "😀"]}
        assert parse_body(b"\xef\xbb\xbf{}") == {}  # the mark of Windows' editors

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"no json",
            b"[]",
            b"3",
            b'"text"',
            b"null",
            b'{"a": NaN}',
            b'{"a": Infinity}',
            b'{"a": -Infinity}',
            b'{"a": 1e400}',
            b'{"a": -1e400}',
            b'{"a": "\xff"}',
            b'{"a": "\xed\xa0\x80"}',
            b'{"a": "\\ud800"}',
            b'{"\\udfff": 1}',
            b'{"a": [{"b": "\\ud83d"}]}',
            b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}",
            b"[" * 200_000,
            b'{"a":' * 100_000,
            b'{"a": ' + b"9" * 5000 + b"}",
            '{"a": 1}'.encode("utf-16"),
        ],
    )
    def test_refuses_what_is_no_json_object(self, payload: bytes) -> None:
        with pytest.raises(RequestError) as caught:
            parse_body(payload)
        assert caught.value.status == 400
        assert caught.value.hint

    def test_accepts_the_deepest_allowed_nesting(self) -> None:
        assert parse_body(b'{"a":' + b"[" * 62 + b"]" * 62 + b"}")

    @settings(deadline=None)
    @given(st.binary(max_size=200))
    def test_raises_nothing_else(self, payload: bytes) -> None:
        with contextlib.suppress(RequestError):
            assert isinstance(parse_body(payload), dict)


class TestFields:
    def test_unknown_fields_are_accepted(self) -> None:
        assert parse_chat({"messages": MESSAGES, "user": "u", "metadata": {"a": 1}, "store": False}).messages

    def test_null_means_not_given(self) -> None:
        names = (
            "temperature",
            "top_p",
            "stop",
            "seed",
            "max_tokens",
            "stream",
            "n",
            "logprobs",
            "tools",
            "tool_choice",
        )
        assert parse_chat({"messages": MESSAGES, **dict.fromkeys(names)}).token_limit is None

    @pytest.mark.parametrize(
        ("field", "value", "param"),
        [
            ("messages", [], "messages"),
            ("messages", None, "messages"),
            ("messages", "Hi", "messages"),
            ("messages", ["Hi"], "messages[0]"),
            ("temperature", "0.7", "temperature"),
            ("temperature", True, "temperature"),
            ("max_tokens", 0, "max_tokens"),
            ("max_tokens", -1, "max_tokens"),
            ("max_tokens", 2**31, "max_tokens"),
            ("max_tokens", 1.5, "max_tokens"),
            ("max_completion_tokens", 0, "max_completion_tokens"),
            ("stop", "", "stop"),
            ("stop", ["a", ""], "stop"),
            ("stop", ["a"] * 17, "stop"),
            ("stop", "x" * 1025, "stop"),
            ("stop", [1], "stop[0]"),
            ("stream", "yes", "stream"),
            ("stream_options", {"include_usage": True}, "stream_options"),
            ("n", 0, "n"),
            ("n", 9, "n"),
            ("n", 1.5, "n"),
            ("n", True, "n"),
            ("logprobs", 3, "logprobs"),
            ("top_logprobs", 3, "top_logprobs"),
            ("top_logprobs", 21, "top_logprobs"),
            ("top_logprobs", -1, "top_logprobs"),
            ("echo", True, "echo"),
            ("response_format", {"type": "xml"}, "response_format.type"),
            ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
            ("response_format", {"type": "text", "json_schema": {"schema": {}}}, "response_format.json_schema"),
            ("response_format", {"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema"),
            ("structured_outputs", {"structural_tag": "x"}, "structured_outputs.structural_tag"),
            ("structured_outputs", {"json": "x"}, "structured_outputs.json"),
            ("structured_outputs", {"choice": []}, "structured_outputs.choice"),
            ("grammar", "root ::= x", "grammar"),
            ("response_format", {}, "response_format.type"),
            ("tools", [], "tools"),
            ("tools", [{"type": "function"}], "tools[0].function"),
            ("tools", [{"type": "function", "function": {"name": ""}}], "tools[0].function.name"),
            ("tool_choice", "auto", "tool_choice"),
            ("functions", [], "functions"),
            ("parallel_tool_calls", "no", "parallel_tool_calls"),
            ("guided_json", "{}", "guided_json"),
            ("guided_regex", 3, "guided_regex"),
            ("guided_choice", [1], "guided_choice[0]"),
            ("logit_bias", {"1": "x"}, "logit_bias.1"),
            ("logit_bias", [1], "logit_bias"),
            ("model", 3, "model"),
            ("thinking_budget", -2, "thinking_budget"),
            ("thinking_budget", 1.5, "thinking_budget"),
            ("reasoning_effort", "lots", "reasoning_effort"),
            ("suffix", "x", "suffix"),
        ],
    )
    def test_refusals_name_the_field(self, field: str, value: Any, param: str) -> None:
        with pytest.raises(RequestError) as caught:
            parse_chat({"messages": MESSAGES, field: value})
        assert caught.value.param == param
        assert caught.value.hint

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"n": 0}, "n"),
            ({"n": 9}, "n"),
            ({"n": "2"}, "n"),
            ({"best_of": 2}, "best_of"),
            ({"echo": 1}, "echo"),
            ({"echo": "yes"}, "echo"),
            ({"logprobs": True}, "logprobs"),
            ({"logprobs": -1}, "logprobs"),
            ({"logprobs": 21}, "logprobs"),
            ({"max_tokens": -1}, "max_tokens"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 0, "echo": False, "logprobs": 1}, "max_tokens"),
            ({"suffix": 3}, "suffix"),
            ({"suffix": "x", "echo": True}, "echo"),
        ],
    )
    def test_refusals_of_completions_name_the_field(self, fields: dict[str, Any], param: str) -> None:
        with pytest.raises(RequestError) as caught:
            parse_completion({"prompt": "a", **fields})
        assert caught.value.param == param
        assert caught.value.hint

    def test_a_refusal_never_repeats_what_was_sent(self) -> None:
        secret = "my-secret-value"
        for field in ("temperature", "stop", "messages", "stream", "tools", "seed", "response_format", "tool_choice"):
            with pytest.raises(RequestError) as caught:
                parse_chat({"messages": MESSAGES, field: {secret: secret}, "tool_choice": {"type": secret}})
            assert secret not in str(caught.value)

    @pytest.mark.parametrize(
        "choice",
        ["always", {"type": "function"}, {"type": "function", "function": {"name": "pump"}}, {"name": "valve"}],
    )
    def test_unknown_tool_choices_are_refused(self, choice: Any) -> None:
        with pytest.raises(RequestError, match="tool_choice"):
            parse_chat({"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice})

    @pytest.mark.parametrize(
        ("fields", "thinks", "limit"),
        [
            ({}, None, None),
            ({"enable_thinking": True}, True, None),
            ({"chat_template_kwargs": {"enable_thinking": False}}, False, None),
            ({"thinking_budget": 7}, True, 7),
            ({"thinking_budget": 0}, False, 0),
            ({"thinking_budget": -1}, None, None),
            ({"thinking_token_budget": 7}, True, 7),
            ({"thinking_budget_tokens": 7}, True, 7),
            ({"chat_template_kwargs": {"thinking_budget": 7}}, True, 7),
            ({"chat_template_kwargs": {"thinking_budget": "x"}}, None, None),
            ({"reasoning_effort": "none"}, False, 0),
            ({"reasoning_effort": "low"}, True, 512),
            ({"reasoning_effort": "high"}, True, None),
            ({"reasoning_effort": "high", "enable_thinking": False}, False, None),
            ({"reasoning_effort": "low", "thinking_budget": 9}, True, 9),
        ],
    )
    def test_how_long_to_think(self, fields: dict[str, Any], thinks: bool | None, limit: int | None) -> None:
        request = parse_chat({"messages": MESSAGES, **fields})
        assert (request.thinking, request.thinking_limit) == (thinks, limit)


class TestPrepare:
    def test_chat_goes_through_the_template(self, model: Model) -> None:
        (generation,) = prepare(model, parse_chat({"messages": MESSAGES}))
        assert model.tokenizer.decode(generation.prompt_ids, skip_special=False) == (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_tools_reach_the_template_as_they_were_sent(self, model: Model) -> None:
        text = _prompt(model, {"messages": MESSAGES, "tools": TOOLS})
        assert json.loads(text.split("# Tools\n")[1].split("\n")[0]) == TOOLS[0]

    def test_tool_choice_none_hides_the_tools(self, model: Model) -> None:
        assert "# Tools" not in _prompt(model, {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none"})

    @pytest.mark.parametrize("body", [{"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}])
    def test_thinking_can_be_switched_off(self, model: Model, body: dict[str, Any]) -> None:
        assert _prompt(model, {"messages": MESSAGES, **body}).endswith("<think>\n\n</think>\n\n")

    def test_sampling_fields_arrive(self, model: Model) -> None:
        body = {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": -1,
            "frequency_penalty": 1.5,
            "seed": -(2**63),
            "logit_bias": {"12": -100},
        }
        sampling = prepare(model, parse_chat({"messages": MESSAGES, **body}))[0].sampling
        assert {name: getattr(sampling, name) for name in body} == {**body, "logit_bias": {12: -100}}

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", 2.1),
            ("temperature", -0.1),
            ("top_p", 1.1),
            ("top_k", -2),
            ("min_p", 2),
            ("repetition_penalty", 0),
            ("presence_penalty", 2.5),
            ("frequency_penalty", -2.5),
            ("seed", 2**63),
            ("logit_bias", {"x": 1}),
            ("logit_bias", {"-1": 1}),
            ("logit_bias", {"9" * 4000: 1}),
            ("logit_bias", {"1": 101}),
            ("temperature", 10**400),
        ],
    )
    def test_values_out_of_range_are_refused(self, model: Model, field: str, value: Any) -> None:
        with pytest.raises(RequestError) as caught:
            prepare(model, parse_chat({"messages": MESSAGES, field: value}))
        assert caught.value.param == field

    def test_limits_and_stops_arrive(self, model: Model) -> None:
        (generation,) = prepare(model, parse_chat({"messages": MESSAGES, "max_completion_tokens": 7, "stop": "\n"}))
        assert (generation.max_tokens, generation.stop) == (7, ("\n",))

    def test_another_model_is_404(self, model: Model) -> None:
        with pytest.raises(ModelNotFoundError):
            prepare(model, parse_chat({"messages": MESSAGES, "model": "gpt-4"}))

    @pytest.mark.parametrize(
        ("prompt", "ids"),
        [
            ("Hi", [(72, 105)]),
            (["Hi"], [(72, 105)]),
            ([72, 105], [(72, 105)]),
            ([[72, 105]], [(72, 105)]),
            ("<|im_start|>", [(257,)]),
            (["a", "b"], [(97,), (98,)]),
            ([[1], [2, 3]], [(1,), (2, 3)]),
            (["a", [1], "a"], [(97,), (1,), (97,)]),
        ],
    )
    def test_forms_of_a_completion_prompt(self, model: Model, prompt: Any, ids: list[tuple[int, ...]]) -> None:
        generations = prepare(model, parse_completion({"prompt": prompt}))
        assert [generation.prompt_ids for generation in generations] == ids

    @pytest.mark.parametrize(
        "prompt",
        [
            "",
            [],
            [""],
            [[]],
            None,
            3,
            [1, "a"],
            [1.5],
            [True],
            [None],
            [{}],
            [[[1]]],
            ["a", ""],
            ["a", None],
            ["a"] * 257,
            [264],
            [-1],
            ["a", [2**64]],
        ],
    )
    def test_other_prompts_are_refused(self, model: Model, prompt: Any) -> None:
        with pytest.raises(RequestError) as caught:
            prepare(model, parse_completion({"prompt": prompt}))
        assert caught.value.param == "prompt"
        assert caught.value.hint or not prompt

    def test_several_choices_differ_in_their_seed_only(self, model: Model) -> None:
        body = {"prompt": ["a", "b"], "n": 3, "temperature": 1.0, "seed": 2**63 - 2}
        generations = prepare(model, parse_completion(body))
        assert [generation.prompt_ids for generation in generations] == [(97,)] * 3 + [(98,)] * 3
        assert [generation.sampling.seed for generation in generations] == [2**63 - 2, 2**63 - 1, -(2**63)] * 2
        assert len({replace(generation.sampling, seed=0).temperature for generation in generations}) == 1
        unseeded = prepare(model, parse_chat({"messages": MESSAGES, "n": 2}))
        assert [generation.sampling.seed for generation in unseeded] == [None, None]

    def test_a_prompt_is_scored_where_it_is_echoed_with_log_probabilities(self, model: Model) -> None:
        for fields, scored in [({}, False), ({"echo": True}, False), ({"logprobs": 1}, False),
                               ({"echo": True, "logprobs": 0}, True)]:  # fmt: skip
            generations = prepare(model, parse_completion({"prompt": ["a", "b"], "n": 2, **fields}))
            assert [generation.score_prompt for generation in generations] == [scored, False] * 2


class TestAnswer:
    def test_a_chat_stream(self, model: Model) -> None:
        body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
        chunks = _stream(model, body, ["He", "", "llo"], "stop")
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert deltas == [{"role": "assistant", "content": "He"}, {"content": "llo"}, {"content": "!"}, {}]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}

    def test_without_include_usage_there_is_none(self, model: Model) -> None:
        chunks = _stream(model, {"messages": MESSAGES, "stream": True}, ["Hi"], "length")
        assert not any("usage" in chunk for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    def test_an_empty_answer_still_has_its_role(self, model: Model) -> None:
        chunks = _stream(model, {"messages": MESSAGES, "stream": True}, [], "stop", held="")
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}]

    def test_a_complete_chat_answer(self, model: Model) -> None:
        body = _complete(model, {"messages": MESSAGES}, ["He", "llo"], "stop")
        assert body["object"] == "chat.completion"
        assert body["model"] == MODEL_NAME
        assert body["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello!"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]
        assert body["usage"] == {
            "prompt_tokens": 20,
            "completion_tokens": 5,
            "total_tokens": 25,
            "prompt_tokens_details": {"cached_tokens": 8},
        }
        assert body["timings"] == {
            "queue_ms": 500.0,
            "ttft_ms": 600.0,
            "prefill_ms": 100.0,
            "prefill_tokens_per_second": 120.0,
            "decode_ms": 400.0,
            "decode_tokens_per_second": 10.0,
        }

    def test_a_text_completion(self, model: Model) -> None:
        body = _complete(model, {"prompt": "a"}, ["<think>", "b"], "length")
        assert body["object"] == "text_completion"
        assert body["choices"][0]["text"] == "<think>b!"
        chunks = _stream(model, {"prompt": "a", "stream": True}, ["b"], "stop")
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["b", "!", ""]
        assert {chunk["object"] for chunk in chunks} == {"text_completion"}

    def test_choices_grow_side_by_side(self, model: Model) -> None:
        body = {"messages": MESSAGES, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
        answer = _answer(model, body)
        second = replace(TIMINGS, num_output_tokens=2, num_cached_tokens=19)
        events = [
            (0, Started()),
            (1, Delta("B", 0)),
            (0, Delta("A", 0)),
            (1, Finished("length", "b", second)),
            (0, Delta("a", 0)),
            (0, Finished("stop", "!", TIMINGS)),
        ]
        chunks = []
        for index, event in events:
            assert not answer.ended
            chunks += answer.chunks(index, event)
        assert answer.ended
        assert [chunk["choices"][0]["index"] for chunk in chunks[:-1]] == [1, 0, 1, 1, 0, 0, 0]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 3 + ["length"] + [
            None
        ] * 2 + ["stop"]
        assert [chunk["timings"]["queue_ms"] for chunk in chunks if "timings" in chunk] == [500.0, 500.0]
        assert len({chunk["id"] for chunk in chunks}) == 1
        usage = {
            "prompt_tokens": 20,
            "completion_tokens": 7,
            "total_tokens": 27,
            "prompt_tokens_details": {"cached_tokens": 8},
        }
        assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage)
        whole = answer.body()
        assert [choice["message"]["content"] for choice in whole["choices"]] == ["Aa!", "Bb"]
        assert [choice["index"] for choice in whole["choices"]] == [0, 1]
        assert [choice["timings"]["decode_ms"] for choice in whole["choices"]] == [400.0, 400.0]
        assert (whole["usage"], "timings" in whole) == (usage, False)

    def test_usage_counts_each_prompt_once(self, model: Model) -> None:
        answer = _answer(model, {"prompt": ["a", "b"], "n": 2})
        for index, num_prompt in enumerate([3, 3, 5, 5]):
            answer.chunks(index, Finished("stop", "", replace(TIMINGS, num_prompt_tokens=num_prompt)))
        assert answer.body()["usage"]["prompt_tokens"] == 8
        assert answer.body()["usage"]["completion_tokens"] == 20

    def test_one_failure_fails_the_whole(self, model: Model) -> None:
        answer = _answer(model, {"messages": MESSAGES, "n": 2})
        answer.chunks(0, Finished("stop", "", TIMINGS))
        assert answer.chunks(1, Failed(EngineError("broken"), TIMINGS)) == [error_body(EngineError("broken"))]
        assert answer.ended
        with pytest.raises(EngineError):
            answer.body()

    def test_an_echo_stands_before_the_answer(self, model: Model) -> None:
        body = _complete(model, {"prompt": "<|im_start|>a", "echo": True}, ["b", "c"], "stop")
        assert body["choices"][0]["text"] == "<|im_start|>abc!"
        chunks = _stream(model, {"prompt": [65, 195], "echo": True, "stream": True}, ["b", "c"], "stop")
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["A\ufffdb", "c", "!", ""]

    def test_timings_are_finite_when_nothing_happened(self, model: Model) -> None:
        nothing = Timings(queue_s=0, prefill_s=0, decode_s=0, num_prompt_tokens=0, num_output_tokens=0)
        answer = _answer(model, {"messages": MESSAGES})
        answer.chunks(0, Finished("stop", "", nothing))
        assert all(math.isfinite(value) for value in answer.body()["timings"].values())

    def test_a_failure_is_an_error_chunk_and_no_body(self, model: Model) -> None:
        answer = _answer(model, {"messages": MESSAGES})
        error = EngineError("broken", hint="try again")
        assert answer.chunks(0, Failed(error, TIMINGS)) == [error_body(error)]
        assert answer.ended
        with pytest.raises(EngineError):
            answer.body()

    def test_a_tool_call_in_a_stream(self, model: Model) -> None:
        text = '<tool_call>\n{"name": "valve", "arguments": {"open": true}}\n</tool_call>'
        chunks = _stream(model, {"messages": MESSAGES, "tools": TOOLS, "stream": True}, text, "stop", held="")
        (call,) = chunks[0]["choices"][0]["delta"].pop("tool_calls")
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
        assert call.pop("id").startswith("call_")
        assert call == {"index": 0, "type": "function", "function": {"name": "valve", "arguments": ""}}
        deltas = [chunk["choices"][0]["delta"]["tool_calls"] for chunk in chunks[1:-1]]
        assert all(fields.keys() == {"index", "function"} for (fields,) in deltas)
        assert len(deltas) > 5
        assert "".join(fields["function"]["arguments"] for (fields,) in deltas) == '{"open": true}'
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    def test_tool_calls_in_a_complete_answer(self, model: Model) -> None:
        block = '<tool_call>{"name": "valve", "arguments": {}}</tool_call>'
        body = _complete(model, {"messages": MESSAGES, "tools": TOOLS}, f"{block}\n{block}", "stop", held="")
        message = body["choices"][0]["message"]
        assert message["content"] is None
        assert len({call["id"] for call in message["tool_calls"]}) == 2
        assert body["choices"][0]["finish_reason"] == "tool_calls"

    def test_without_tools_a_block_is_text(self, model: Model) -> None:
        block = '<tool_call>{"name": "valve"}</tool_call>'
        body = _complete(model, {"messages": MESSAGES}, block, "stop", held="")
        assert body["choices"][0]["message"] == {"role": "assistant", "content": block}

    def test_reasoning_is_split_off(self, model: Model) -> None:
        body = _complete(model, {"messages": MESSAGES}, "<think>\nhm\n</think>\n\n42", "stop", held="")
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "42", "reasoning_content": "hm"}

    def test_a_prompt_that_opens_the_reasoning(self) -> None:
        model = make_model(template=CHAT_TEMPLATE + "{{ '<think>\\n' }}")
        body = _complete(model, {"messages": MESSAGES}, "hm</think>42", "stop", held="")
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "42", "reasoning_content": "hm"}

    def test_thinking_switched_off_leaves_all_text_in_content(self, model: Model) -> None:
        body = {"messages": MESSAGES, "enable_thinking": False}
        text = "<think>a</think>b"
        assert _complete(model, body, text, "stop", held="")["choices"][0]["message"]["content"] == text


CALL = '{"name": "f", "arguments": {"a": 1}}'
BLOCKS: list[tuple[str, list[Piece]]] = [
    ("plain", [Content("plain")]),
    ("a < b <tool", [Content("a < b <tool")]),
    (f"<tool_call>\n{CALL}\n</tool_call>", [Call(0, "", "f", '{"a": 1}')]),
    (f"text\n\n<tool_call>{CALL}</tool_call>\n", [Content("text"), Call(0, "", "f", '{"a": 1}')]),
    (
        f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
        [Call(0, "", "f", '{"a": 1}'), Call(1, "", "f", '{"a": 1}')],
    ),
    (
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>\\"<"}}</tool_call>after',
        [Call(0, "", "f", '{"a": "</tool_call>\\"<"}'), Content("after")],
    ),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [Call(0, "", "f", '{"a": 1}')]),
    ('<tool_call>{"name": "f"}</tool_call>', [Call(0, "", "f", "{}")]),
    ("<tool_call>{broken}</tool_call> x", [Content("<tool_call>{broken}</tool_call> x")]),
    ('<tool_call>{"name": 3}</tool_call>', [Content('<tool_call>{"name": 3}</tool_call>')]),
    ("<tool_call>[1]</tool_call>", [Content("<tool_call>[1]</tool_call>")]),
    (f"<tool_call>{CALL}", [Call(0, "", "f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "argum', [Content('<tool_call>{"name": "f", "argum')]),
    ('<tool_call>{"name": "f", "arguments": {"a": "cut o', [Call(0, "", "f", '{"a": "cut o')]),
    ('<tool_call>{"arguments": {"a": true}, "name": "f"}</tool_call>', [Call(0, "", "f", '{"a": true}')]),
    ('<tool_call>{"name": "f", "arguments": {"a": [{}, "}"]}, "id": 3}</tool_call>x',
     [Call(0, "", "f", '{"a": [{}, "}"]}'), Content("x")]),
    ('<tool_call>{"name": "\\u0066", "arguments": {}}</tool_call>', [Call(0, "", "f", "{}")]),
    ('<tool_call>{"name": "\\x", "arguments": {}}</tool_call>',
     [Content('<tool_call>{"name": "\\x", "arguments": {}}</tool_call>')]),
    (f"<tool_call>{{}}</tool_call><tool_call>{CALL}</tool_call>",
     [Content("<tool_call>{}</tool_call>"), Call(0, "", "f", '{"a": 1}')]),
    (CALL, [Content(CALL)]),
    ("<think>\na\n\nb\n</think>\n\nc", [Reasoning("a\n\nb"), Content("c")]),
    ("  <think>a", [Reasoning("a")]),
    ("<think></think>c", [Content("c")]),
    ("<think>\n", []),
    ("<thin", [Content("<thin")]),
    ("x<think>y</think>", [Content("x<think>y</think>")]),
    ("<think>a < b</think>c", [Reasoning("a < b"), Content("c")]),
    (f"<think>{CALL}<tool_call></think><tool_call>{CALL}</tool_call>",
     [Reasoning(f"{CALL}<tool_call>"), Call(0, "", "f", '{"a": 1}')]),
    ("trailing \n", [Content("trailing \n")]),
    ("", []),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("text", "expected"), BLOCKS)
def test_blocks_do_not_depend_on_how_the_text_is_cut(text: str, expected: list[Piece], size: int) -> None:
    parser = BlockParser(reasoning=True, tools=True)
    pieces = [piece for start in range(0, len(text), size) for piece in parser.push(text[start : start + size])]
    assert _merged([*pieces, *parser.flush()]) == expected


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, '"', "\\", "\n", "x<"])))
def test_no_text_is_lost(parts: list[str]) -> None:
    parser = BlockParser(reasoning=False, tools=True)
    pieces = [piece for part in parts for piece in parser.push(part)]
    merged = _merged([*pieces, *parser.flush()])
    rest = "".join(parts)
    for piece in merged:
        text = CALL if isinstance(piece, Call) else piece.text.strip()
        assert text in rest
        rest = rest[rest.index(text) + len(text) :]
    # What stands between the arguments of a call and its end tag belongs to nobody.
    if not any(isinstance(piece, Call) for piece in merged):
        assert not rest.strip()


class TestErrorBody:
    def test_shape(self) -> None:
        error = RequestError("too hot", hint="cool it", param="temperature")
        assert error_body(error) == {
            "error": {
                "message": "too hot",
                "type": "invalid_request_error",
                "param": "temperature",
                "code": "invalid_request",
                "hint": "cool it",
            }
        }

    def test_kinds(self) -> None:
        assert error_body(EngineError("x"))["error"]["type"] == "server_error"
        overloaded = error_body(OverloadedError("x", retry_after_s=1.5))["error"]
        assert (overloaded["type"], overloaded["retry_after_ms"]) == ("rate_limit_error", 1500)
        assert isinstance(OverloadedError("x"), QwedgeError)


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbouring text pieces as one; calls without their random id."""
    result: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Call):
            result.append(Call(piece.index, "", piece.name, piece.arguments))
        elif isinstance(piece, Arguments):
            call = result.pop()
            assert isinstance(call, Call)
            assert call.index == piece.index
            result.append(replace(call, arguments=call.arguments + piece.text))
        elif result and type(result[-1]) is type(piece):
            result[-1] = type(piece)(result[-1].text + piece.text)  # type: ignore[union-attr]
        else:
            result.append(piece)
    return result


def _prompt(model: Model, body: dict[str, Any]) -> str:
    return model.tokenizer.decode(prepare(model, parse_chat(body))[0].prompt_ids, skip_special=False)


def _answer(model: Model, body: dict[str, Any]) -> Answer:
    request = parse_chat(body) if "messages" in body else parse_completion(body)
    return Answer(model, request, prepare(model, request))


def _stream(
    model: Model, body: dict[str, Any], texts: Iterable[str], reason: FinishReason, held: str = "!"
) -> list[dict[str, Any]]:
    return _run(_answer(model, body), texts, reason, held)


def _complete(
    model: Model, body: dict[str, Any], texts: Iterable[str], reason: FinishReason, held: str = "!"
) -> dict[str, Any]:
    answer = _answer(model, body)
    _run(answer, texts, reason, held)
    return answer.body()


def _run(answer: Answer, texts: Iterable[str], reason: FinishReason, held: str) -> list[dict[str, Any]]:
    events = [Queued(0, 0.0), Started(), *(Delta(text, 0) for text in texts), Finished(reason, held, TIMINGS)]
    return [chunk for event in events for chunk in answer.chunks(0, event)]
