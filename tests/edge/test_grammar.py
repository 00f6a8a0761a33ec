"""Constrained decoding with llguidance itself: random logits, small vocabularies, and every answer fits its grammar."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from edge.engine import grammar_source
from edge.engine.grammar import CACHED_GRAMMARS, Constraint, Grammars
from edge.engine.grammar_source import Grammar
from edge.engine.sampler import Sampler, SamplingParams
from edge.errors import EngineError, RequestError
from edge.tokenizer import Tokenizer

EVENT = {
    "type": "object",
    "properties": {
        "level": {"enum": ["INFO", "WARN", "ERROR"]},
        "code": {"type": "integer", "minimum": 0, "maximum": 999},
        "message": {"type": "string", "maxLength": 12},
        "ok": {"type": "boolean"},
    },
    "required": ["level", "code", "message"],
    "additionalProperties": False,
}
EVENTS = {
    "type": "object",
    "properties": {"events": {"type": "array", "items": EVENT, "maxItems": 2}},
    "required": ["events"],
    "additionalProperties": False,
}
EOS = ("<|im_end|>", "<|endoftext|>")


def _tokenizer() -> Tokenizer:
    """A byte-level BPE of 600 tokens, trained on the kind of text it is used for."""
    text = json.dumps({"events": [{"level": "WARN", "code": 12, "message": "Tür öffnet nicht 🙂", "ok": True}] * 3})
    corpus = [text, json.dumps(EVENTS), '{"level": "INFO", "code": 7, "message": "€uro"}', "yes no maybe"] * 5
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*EOS, "<|im_start|>")])
    backend.add_tokens([AddedToken(token, special=False) for token in ("<tool_call>", "</tool_call>")])
    return Tokenizer(backend)


TOKENIZER = _tokenizer()
VOCAB = TOKENIZER.vocab_size
EOS_IDS = frozenset(token_id for token in EOS if (token_id := TOKENIZER.id_of(token)) is not None)
GRAMMARS = Grammars(TOKENIZER, VOCAB, EOS_IDS)


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def choice(*values: str) -> Grammar:
    return Grammar("choice", json.dumps(values))


def answer(grammar: Grammar, *, seed: int, most: int = 400, **sampling: float) -> tuple[str, bool]:
    """Text that random logits give under a grammar, and whether it ended by itself."""
    params = SamplingParams(**{"temperature": 1.0, "seed": seed, **sampling})
    sampler = Sampler(params, [], VOCAB, constraint=GRAMMARS.constraint(grammar))
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for _ in range(most):
        sampler.prepare()
        ids.append(sampler.sample(rng.normal(scale=3.0, size=VOCAB + 5).astype(np.float32)))
        if ids[-1] in EOS_IDS:
            return _bytes(ids[:-1]).decode(), True
    return _bytes(ids).decode(errors="replace"), False


def _bytes(ids: list[int]) -> bytes:
    return b"".join(map(TOKENIZER.token_bytes, ids))


def follow(constraint: Constraint, text: str) -> None:
    for token_id in TOKENIZER.encode(text, special=False):
        constraint.accept(token_id)


def allowed(constraint: Constraint) -> set[int]:
    return set(np.flatnonzero(constraint.mask(np.zeros(VOCAB, np.float32)) == 0).tolist())


def check_event(event: dict[str, object]) -> None:
    assert {"level", "code", "message"} <= event.keys() <= {"level", "code", "message", "ok"}
    assert event["level"] in {"INFO", "WARN", "ERROR"}
    assert type(event["code"]) is int
    assert 0 <= event["code"] <= 999
    assert isinstance(event["message"], str)
    assert len(event["message"]) <= 12
    assert isinstance(event.get("ok", True), bool)


class TestAnswers:
    @pytest.mark.parametrize("seed", range(8))
    def test_every_answer_validates(self, seed: int) -> None:
        text, ended = answer(schema(EVENTS), seed=seed)
        assert ended
        value = json.loads(text)
        assert value.keys() == {"events"}
        assert len(value["events"]) <= 2
        for event in value["events"]:
            check_event(event)

    @pytest.mark.parametrize(
        "sampling",
        [
            {"temperature": 0.0},
            {"top_k": 5, "top_p": 0.5},
            {"min_p": 0.2},
            {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0},
            {"temperature": 0.0, "repetition_penalty": 0.5},
        ],
    )
    def test_whatever_the_sampling(self, sampling: dict[str, float]) -> None:
        text, ended = answer(schema(EVENT), seed=1, **sampling)
        assert ended
        check_event(json.loads(text))

    def test_same_seed_same_text(self) -> None:
        assert answer(schema(EVENTS), seed=5) == answer(schema(EVENTS), seed=5)

    def test_strings_hold_whole_characters(self) -> None:
        texts = [answer(schema({"type": "string", "minLength": 3, "maxLength": 9}), seed=seed)[0] for seed in range(30)]
        assert any(not text.isascii() for text in texts)
        for text in texts:
            assert 3 <= len(json.loads(text)) <= 9

    def test_json_is_one_line_with_plain_separators(self) -> None:
        text, _ = answer(schema(EVENT), seed=3)
        assert text == json.dumps(json.loads(text), ensure_ascii=False)

    def test_a_schema_may_choose_other_separators(self) -> None:
        loose = {**EVENT, "x-guidance": {"whitespace_flexible": False, "item_separator": ","}}
        assert ',"code"' in answer(schema(loose), seed=3)[0]

    @pytest.mark.parametrize("seed", range(10))
    def test_choice(self, seed: int) -> None:
        choices = ("yes", "no", "maybe", "日本 🙂", 'say "no"\n')
        text, ended = answer(choice(*choices), seed=seed)
        assert ended
        assert text in choices

    @pytest.mark.parametrize("seed", range(5))
    def test_regex(self, seed: int) -> None:
        pattern = r"[A-Z][a-z]{2,5}-(19|20)[0-9]{2}(\.5)?"
        text, ended = answer(Grammar("regex", pattern), seed=seed)
        assert ended
        assert re.fullmatch(pattern, text)

    @pytest.mark.parametrize("seed", range(5))
    def test_lark(self, seed: int) -> None:
        source = 'start: sum "=" NUMBER\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[0-9]{1,3}/'
        text, ended = answer(Grammar("lark", source), seed=seed)
        assert ended
        assert re.fullmatch(r"\d{1,3}(\+\d{1,3})*=\d{1,3}", text)

    @pytest.mark.parametrize("seed", range(5))
    def test_tool_call(self, seed: int) -> None:
        tools = {
            "log": EVENT,
            'od"d\\ tool': {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "maxProperties": 0}}},
        }
        source = {"form": "json", "how_many": "one", "functions": tools}
        text, ended = answer(Grammar("tool_calls", json.dumps(source)), seed=seed)
        assert ended
        assert text.startswith("<tool_call>\n")
        assert text.endswith("\n</tool_call>")
        call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        assert call.keys() == {"name", "arguments"}
        if call["name"] == "log":
            check_event(call["arguments"])
        else:
            assert call == {"name": 'od"d\\ tool', "arguments": {}}

    def test_the_distribution_is_the_models_over_what_is_allowed(self) -> None:
        logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
        firsts = sorted(allowed(GRAMMARS.constraint(choice("yes", "no"))))
        expected = np.exp(logits[firsts].astype(np.float64))
        expected /= expected.sum()
        draws = []
        for seed in range(2000):
            params = SamplingParams(temperature=1.0, seed=seed)
            draws.append(Sampler(params, [], VOCAB, constraint=GRAMMARS.constraint(choice("yes", "no"))).sample(logits))
        assert [draws.count(i) / len(draws) for i in firsts] == pytest.approx(expected, abs=0.04)

    def test_bias_is_added_within_the_grammar_only(self) -> None:
        yes, other = (TOKENIZER.encode(text, special=False)[0] for text in ("yes", "maybe"))
        params = SamplingParams(logit_bias={yes: 5.0, other: 100.0})
        sampler = Sampler(params, [], VOCAB, constraint=GRAMMARS.constraint(choice("yes", "no")))
        assert sampler.sample(np.zeros(VOCAB, np.float32)) == yes

    def test_broken_logits_are_the_engines_fault(self) -> None:
        sampler = Sampler(SamplingParams(), [], VOCAB, constraint=GRAMMARS.constraint(choice("yes")))
        with pytest.raises(EngineError):
            sampler.sample(np.full(VOCAB, np.nan, np.float32))


class TestConstraint:
    def test_a_complete_answer_can_only_end(self) -> None:
        constraint = GRAMMARS.constraint(choice("yes", "no"))
        follow(constraint, "yes")
        assert allowed(constraint) == EOS_IDS
        for token_id in EOS_IDS:  # a benchmark that ignores the end goes on with it
            constraint.accept(token_id)
            assert allowed(constraint) == EOS_IDS
            assert constraint.forced_tokens() == []

    def test_an_answer_that_may_go_on_may_end(self) -> None:
        constraint = GRAMMARS.constraint(Grammar("regex", "a+"))
        assert not allowed(constraint) & EOS_IDS
        follow(constraint, "aa")
        assert {*EOS_IDS, TOKENIZER.id_of("a")} <= allowed(constraint)

    def test_special_tokens_are_no_text(self) -> None:
        constraint = GRAMMARS.constraint(Grammar("regex", "(.|\n)*"))
        assert not allowed(constraint) & (TOKENIZER.special_ids - EOS_IDS)

    def test_forced_tokens_are_what_a_step_by_step_answer_has(self) -> None:
        constraint = GRAMMARS.constraint(schema(EVENTS))
        forced = constraint.forced_tokens()
        assert len(forced) >= 2
        assert '{"events": ['.startswith(_bytes(forced).decode())
        for token_id in forced:
            assert token_id in allowed(constraint)
            constraint.accept(token_id)

    def test_forced_tokens_change_nothing(self) -> None:
        asked, other = GRAMMARS.constraint(schema(EVENT)), GRAMMARS.constraint(schema(EVENT))
        for token_id in TOKENIZER.encode('{"level": "WARN", "code": 12, "message": "ü"}', special=False):
            assert asked.forced_tokens() == asked.forced_tokens()
            assert allowed(asked) == allowed(other)
            asked.forced_tokens()
            asked.accept(token_id)
            other.accept(token_id)
        assert allowed(asked) == allowed(other) == EOS_IDS

    def test_a_slow_mask_is_computed_ahead_and_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edge.engine.grammar._OVERLAP_ABOVE_S", 0.0)
        ahead, plain = GRAMMARS.constraint(schema(EVENTS)), GRAMMARS.constraint(schema(EVENTS))
        for token_id in TOKENIZER.encode('{"events": [{"level": "WARN", "code": 1', special=False):
            ahead.prepare()
            ahead.prepare()
            assert allowed(ahead) == allowed(plain)
            ahead.prepare()
            ahead.accept(token_id)
            ahead.prepare()
            assert ahead.forced_tokens() == (plain.accept(token_id), plain.forced_tokens())[1]

    def test_answers_do_not_share_their_place(self) -> None:
        first, second = GRAMMARS.constraint(choice("yes", "no")), GRAMMARS.constraint(choice("yes", "no"))
        follow(first, "yes")
        assert not allowed(second) & EOS_IDS


def _nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {"type": "string"}
    for _ in range(levels):
        value = {"type": "object", "properties": {"a": value}, "required": ["a"]}
    return value


def _bomb(levels: int, keyword: str) -> dict[str, object]:
    def twice(i: int) -> list[dict[str, str]]:
        return [{"$ref": f"#/$defs/d{i}"}] * 2

    defs: dict[str, object] = {f"d{i}": {keyword: twice(i + 1)} for i in range(levels)}
    return {"$defs": {**defs, f"d{levels}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def _fake_words(count: int) -> list[str]:
    return [f"word{i * 7919 % 10007}" for i in range(count)]


def _chain(length: int) -> str:
    rules = [f"a{i}: a{i + 1}" for i in range(length)]
    return "\n".join(["start: a0", *rules, f'a{length}: "x"'])


REFUSED = {
    "no schema": Grammar("json_schema", "5"),
    "unknown type": schema({"type": "strin"}),
    "unsupported keyword": schema({"type": "object", "dependentRequired": {"a": ["b"]}}),
    "odd keywords": schema({"properties": 5, "enum": 3, "multipleOf": "x"}),
    "remote reference": schema({"$ref": "http://example.com/x.json"}),
    "deep nesting": schema(_nested(40)),
    "very deep nesting": schema(_nested(200)),
    "huge enum": schema({"enum": _fake_words(1001)}),
    "many properties": schema({"type": "object", "properties": {word: {} for word in _fake_words(501)}}),
    "multiple of a large number": schema({"type": "integer", "multipleOf": 999_983}),
    "multiple of several": schema({"allOf": [{"type": "integer", "multipleOf": n} for n in (97, 89, 83)]}),
    "multiple of a tiny number": schema({"type": "number", "multipleOf": 1e-9}),
    "an intersection of patterns": schema(
        {"allOf": [{"type": "string", "pattern": f"^.*{c}.*$"} for c in "abcdefghi"]}
    ),
    "a large source": Grammar("regex", "a" * 70_000),
    "bad regex": Grammar("regex", "(a"),
    "deep regex": Grammar("regex", "(" * 3000 + "a" + ")" * 3000),
    "bad lark": Grammar("lark", "start: nope"),
    "deep lark": Grammar("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    "a schema inside lark": Grammar("lark", 'start: %json {"type": "integer", "multipleOf": 999983}'),
    "many choices": choice(*_fake_words(1001)),
    # Each of these would end the process.
    "the least integer": schema({"enum": [-(2**63)]}),
    "the least integer but two, deep inside": schema({"type": "array", "items": {"const": [[2 - 2**63]]}}),
    "a long chain of rules": Grammar("lark", _chain(3000)),
    "a long chain of definitions": schema(
        {"$ref": "#/$defs/0", "$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(1800)} | {"1800": {}}}
    ),
}
BOUNDED = {
    "exponential regex": Grammar("regex", "(a+)+$"),
    "nested repetition": Grammar("regex", "((a{1,100}){1,100}){1,100}b"),
    "ambiguous regex": Grammar("regex", "(x|y)*x(x|y){18}"),
    "letters of the world": Grammar("regex", r"\w{1,5000}"),
    "references by twos": schema(_bomb(30, "anyOf")),
    "intersections by twos": schema(_bomb(24, "allOf")),
    "recursion": schema({"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}),
    "a schema that is itself": schema({"$ref": "#"}),
    "many items": schema({"type": "array", "items": {"type": "integer"}, "minItems": 50_000}),
    "long strings": schema({"type": "string", "maxLength": 1_000_000}),
    "a wide range": schema({"type": "integer", "minimum": -(10**17), "maximum": 10**17 + 3}),
    "properties to the limit": schema({"type": "object", "properties": {word: {} for word in _fake_words(500)}}),
    "choices to the limit": choice(*_fake_words(1000)),
    "a chain of rules to the limit": Grammar("lark", _chain(498)),
    "integers to the limit": schema({"enum": [-(2**62), 2**63]}),
    "ambiguous grammar": Grammar("lark", 'start: s\ns: s s | s s s | "a" | '),
}


class TestLimits:
    @pytest.mark.parametrize("name", REFUSED)
    def test_what_is_refused(self, name: str) -> None:
        began = time.thread_time()
        with pytest.raises(RequestError, match=r"the grammar is not usable: .") as caught:
            GRAMMARS.constraint(Grammar(REFUSED[name].kind, REFUSED[name].source, "guided_json"))
        assert time.thread_time() - began < 0.25
        assert caught.value.status == 400
        assert caught.value.param == "guided_json"
        assert len(caught.value.message) < 200
        assert caught.value.message.isprintable()

    @pytest.mark.parametrize("name", BOUNDED)
    def test_what_is_costly_is_bounded(self, name: str) -> None:
        """Each step is quick, and the answer goes on or the request is refused (nothing else is raised): no hang."""
        rng = np.random.default_rng(0)
        began = time.thread_time()
        with contextlib.suppress(RequestError):
            sampler = Sampler(SamplingParams(), [], VOCAB, constraint=GRAMMARS.constraint(BOUNDED[name]))
            for _ in range(50):
                assert time.thread_time() - began < 0.25
                began = time.thread_time()
                if sampler.sample(rng.normal(size=VOCAB).astype(np.float32)) in EOS_IDS:
                    break
        assert time.thread_time() - began < 0.25

    def test_small_divisors_are_fine(self) -> None:
        value, ended = answer(schema({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 500}), seed=1)
        assert ended
        assert int(value) % 7 == 0
        assert grammar_source.MAX_DIVISOR >= 100

    def test_compiled_grammars_are_kept_and_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        grammars = Grammars(TOKENIZER, VOCAB, EOS_IDS)
        compiled: list[Grammar] = []
        original = Grammars._compile
        monkeypatch.setattr(Grammars, "_compile", lambda self, g: (compiled.append(g), original(self, g))[1])
        kept = choice("kept")
        for index in range(CACHED_GRAMMARS + 1):
            grammars.constraint(kept)
            grammars.constraint(choice(f"other {index}"))
        assert compiled.count(kept) == 1
        grammars.constraint(choice("other 0"))
        assert compiled.count(choice("other 0")) == 2


def test_llguidance_is_loaded_by_the_first_grammar_only() -> None:
    import subprocess

    code = "import sys, edge.service; assert 'llguidance' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
