"""Every type of assertion, with answers that hold and answers that do not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from edge.evaluation import extract
from edge.evaluation.answer import Answer
from edge.evaluation.assertions import prepare
from edge.evaluation.schema import Assertion
from edge.evaluation.text_distance import chrf, edit_distance


def judge(answer: str, latency_ms: float = 5.0, **fields: Any) -> tuple[bool, float]:
    spec = Assertion(**fields)
    found = prepare(spec, spec.value).judge(Answer(answer, latency_ms))
    return found.passed, found.score


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"type": "contains", "value": "Oil"}, ["the Oil"], ["the oil"]),
        ({"type": "icontains", "value": "STRASSE"}, ["Die Straße"], ["Weg"]),
        ({"type": "not-contains", "value": "sorry"}, ["fine"], ["so sorry"]),
        ({"type": "contains-all", "value": ["a", "b"]}, ["ab"], ["a"]),
        ({"type": "icontains-any", "value": ["a", "B"]}, ["xb"], ["x"]),
        ({"type": "equals", "value": "yes"}, [" yes\n"], ["Yes", "yes!"]),
        ({"type": "equals", "value": 18}, ["18"], ["18.0"]),
        ({"type": "starts-with", "value": "WO"}, ["WO1"], ["wo1", "xWO"]),
        ({"type": "is-one-of", "value": ["stop", "check"]}, ["**STOP**.", "Check"], ["stop it", ""]),
        ({"type": "is-one-of", "value": "停"}, ["「停」。"], ["停机"]),
        ({"type": "regex", "value": r"^WO\d{3}$"}, ["WO123"], ["WO12"]),
        ({"type": "not-regex", "value": r"(?i)error"}, ["ok"], ["ERROR"]),
        ({"type": "is-json"}, ['{"a": 1}', " [1] "], ["{'a': 1}", "NaN", "x {}", ""]),
        ({"type": "is-json", "value": {"required": ["a"]}}, ['{"a": 1}'], ['{"b": 1}']),
        ({"type": "contains-json", "value": {"required": ["a"]}}, ['so:\n```json\n{"a": 1}\n```'], ["{a: 1}", "x"]),
        ({"type": "number", "value": 18}, ["so 3 and 18.", "$18", "18 Eier", "18,0"], ["18 and 3", "none", "180"]),
        ({"type": "number", "value": 80000}, ["80.000", "80,000", "80000 €"], ["80"]),
        ({"type": "number", "value": -2.5}, ["-2.5", "\N{MINUS SIGN}2,5"], ["2.5"]),
        ({"type": "number", "value": 10, "tolerance": 0.5}, ["10.4"], ["10.6"]),
        ({"type": "number", "value": 7, "after": "Answer:"}, ["1 Answer: 7 (of 9)"], ["7", "Answer: x"]),
        ({"type": "levenshtein", "value": "bearing", "threshold": 1}, ["bearin", "Bearing"], ["baring2"]),
        ({"type": "chrf", "value": "replace the bearing", "threshold": 0.6}, ["replace bearing"], ["change oil"]),
        ({"type": "latency", "threshold": 10}, ["x"], []),
        ({"type": "latency", "threshold": 1}, [], ["x"]),
    ],
)
def test_answers_hold_or_not(fields: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert [judge(answer, **fields)[0] for answer in [*good, *bad]] == [True] * len(good) + [False] * len(bad)


def test_scores_between_nothing_and_all() -> None:
    passed, score = judge("replace the bearings", type="chrf", value="replace the bearing")
    assert passed
    assert 0.8 < score < 1
    assert judge("x", type="not-chrf", value="replace the bearing") == (True, 1.0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"type": "javascript", "value": "true"}, "no code of a suite is executed"),
        ({"type": "not-python", "value": "True"}, "no code of a suite is executed"),
        ({"type": "llm-rubric", "value": "nice"}, "no model judges"),
        ({"type": "similar", "value": "x"}, "chrf"),
        ({"type": "nonsense"}, "known are"),
        ({"type": "contains"}, "text as its value"),
        ({"type": "contains", "value": []}, "text as its value"),
        ({"type": "contains", "value": "x", "threshold": 1.0}, "threshold does not belong"),
        ({"type": "number", "value": "many"}, "number as its value"),
        ({"type": "number", "value": True}, "number as its value"),
        ({"type": "regex", "value": "(?<=a)b"}, "look-"),
        ({"type": "regex", "value": "a" * 3000}, "characters"),
        ({"type": "is-json", "value": {"type": "thing"}}, "cannot have"),
        ({"type": "levenshtein", "value": "x" * 3000}, "characters"),
        ({"type": "chrf", "value": "x", "threshold": 2}, "0 to 1"),
        ({"type": "latency"}, "threshold in ms"),
    ],
)
def test_what_cannot_be_judged_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        judge("x", **fields)


def test_hostile_patterns_and_answers_take_no_time() -> None:
    began = time.process_time()
    text = "a" * 200_000
    assert not judge(text + "!", type="regex", value=r"^(a|aa)+$")[0]
    assert not judge("[" * 200_000, type="contains-json")[0]
    assert not judge("[" * 200_000, type="is-json")[0]
    assert not judge("1" * 200_000, type="number", value=1)[0]
    assert not judge(text, type="levenshtein", value="b")[0]
    judge("```" * 60_000, type="contains-json")
    assert time.process_time() - began < 2


def test_code_is_found_in_its_block() -> None:
    assert extract.code("Sure:\n```python\ndef f():\n    return 1\n```\nand\n```\nf()\n```") == "def f():\n    return 1"
    assert extract.code("```py\nx = 1") == "x = 1"
    assert extract.code("    return 2\n") == "    return 2"


def test_edit_distance_is_levenshteins() -> None:
    assert edit_distance("kitten", "sitting", 10) == 3
    assert edit_distance("", "abc", 10) == 3
    assert edit_distance("abcdef", "uvwxyz", 2) == 3


def test_chrf_is_one_for_the_same_and_nothing_for_another_script() -> None:
    assert chrf("更换主轴轴承", "更换主轴轴承") == 1.0
    assert chrf("abc", "更换主轴") == 0.0
    assert chrf("", "") == 1.0
    # By hand: letters 2 of 2 and 2 of 3, pairs 1 of 1 and 1 of 2; precision 1, recall 7/12, F2 = 35/55.
    assert chrf("a b", "abc") == pytest.approx(35 / 55)
