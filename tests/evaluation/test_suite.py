"""From a suite's file to cases, and errors that name the line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError
from edge.evaluation.answer import Answer
from edge.evaluation.assertions import TYPES
from edge.evaluation.suite import BUILT_IN, Suite, built_in_suites, load_suite

ROOT = Path(__file__).parents[2]
SMALL = """\
description: Two questions
prompts:
  - "Translate {{word}} to {{language}}."
  - label: chat
    config: {max_tokens: 7}
    raw:
      - {role: system, content: "You translate to {{language}}."}
      - {role: user, content: hello}
      - {role: assistant, content: hallo}
      - {role: user, content: "{{word}}"}
defaultTest:
  vars: {language: German}
  options: {temperature: 0.5}
  metadata: {kind: words}
  assert:
    - {type: not-contains, value: sorry}
tests:
  - description: first
    vars: {word: bearing, expected: Lager}
    assert:
      - {type: icontains, value: "{{expected}}", weight: 2, metric: right}
  - vars: {word: [oil, pump], n: 3}
    prompts: [chat]
    threshold: 0.5
    options: {max_tokens: 9, stop: ["{{word}}"]}
    metadata: {kind: list}
    assert:
      - {type: is-json, value: {properties: {n: {const: "{{n}}"}}}}
"""


def write(folder: Path, text: str, name: str = "suite.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str) -> Suite:
    return load_suite(write(folder, text))


def test_every_prompt_meets_every_test(tmp_path: Path) -> None:
    suite = load(tmp_path, SMALL)
    assert [case.id for case in suite.cases] == ["1/1", "1/chat", "2", "3"]
    first, second, third, fourth = suite.cases
    assert first.body == {
        "messages": [{"role": "user", "content": "Translate bearing to German."}],
        "temperature": 0.5,
        "max_tokens": 512,
    }
    assert [turn["content"] for turn in second.body["messages"]] == [
        "You translate to German.", "hello", "hallo", "bearing",
    ]  # fmt: skip
    assert second.body["max_tokens"] == 7
    assert (third.question, fourth.question) == ("oil", "pump")
    assert third.body["max_tokens"] == 9
    assert third.body["stop"] == ["oil"]
    assert (first.metadata, third.metadata) == ({"kind": "words"}, {"kind": "list"})
    assert [check.weight for check in first.checks] == [1, 2]


def test_a_variable_alone_keeps_its_type(tmp_path: Path) -> None:
    check = load(tmp_path, SMALL).cases[2].checks[1]
    assert check.judge(Answer('{"n": 3}', 1)).passed
    assert not check.judge(Answer('{"n": "3"}', 1)).passed


def test_what_a_variable_says_is_not_looked_at_again(tmp_path: Path) -> None:
    text = (
        'prompts: ["{{a}}"]\ntests:\n  - vars: {a: "{{b}} {% x %}"}\n    assert: [{type: contains, value: "{{a}}"}]\n'
    )
    assert load(tmp_path, text).cases[0].question == "{{b}} {% x %}"


def test_digests_follow_what_is_asked_and_what_is_judged(tmp_path: Path) -> None:
    before = load(tmp_path, SMALL)
    same = load(tmp_path, SMALL.replace("description: first", "description: other"))
    changed = load(tmp_path, SMALL.replace("expected: Lager", "expected: Kugellager"))
    assert before.digest == same.digest
    assert [a.digest == b.digest for a, b in zip(before.cases, changed.cases, strict=True)] == [
        False,
        False,
        True,
        True,
    ]


def test_parts_of_a_suite(tmp_path: Path) -> None:
    suite = load(tmp_path, SMALL)
    assert [case.id for case in suite.limited(2).cases] == ["1/1", "2"]
    assert [case.id for case in suite.where({"kind": "list"}).cases] == ["2", "3"]
    with pytest.raises(ConfigError, match=r"kind"):
        suite.where({"language": "de"})


def test_tests_and_prompts_of_other_files(tmp_path: Path) -> None:
    lines = [{"vars": {"q": "one"}, "assert": [{"type": "contains", "value": "1"}]}, {"vars": {"q": "two"}}]
    write(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n", "data.jsonl")
    write(tmp_path, '[{"role": "system", "content": "Count."}, {"role": "user", "content": "{{q}}"}]', "prompt.json")
    text = """\
prompts: [file://prompt.json, 'Say {{q}}.']
defaultTest: {assert: [{type: regex, value: .}]}
tests: [file://data.jsonl]
"""
    suite = load(tmp_path, text)
    assert [case.question for case in suite.cases] == ["one", "Say one.", "two", "Say two."]
    assert [len(case.checks) for case in suite.cases] == [2, 2, 1, 1]


TESTS = "tests:\n  - vars: {a: 1}\n    assert: [{type: contains, value: x}]\n"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("prompts: [x]\ntests:\n  - assert:\n      - type: javascript\n        value: 1 == 1\n", 4, "no code"),
        ("prompts: [x]\ntests:\n  - assert: [{type: contains}]\n", 3, "text as its value"),
        ("prompts: [x]\ntests:\n  - {}\n", 3, "no assertion"),
        ("prompts: [x]\ndefaultTest:\n  assert:\n    - {type: regex, value: '('}\n" + TESTS, 4, "pattern"),
        ("prompts: ['{{b}}']\n" + TESTS, 3, "no variable 'b'"),
        ("prompts: ['{{ a | upper }}']\n" + TESTS, 3, "only {{name}} is replaced"),
        ("prompts: ['{% if a %}x{% endif %}']\n" + TESTS, 3, "only {{name}} is replaced"),
        ("prompts: [x]\nproviders: [openai:gpt-4]\n" + TESTS, 2, "'providers' is not known"),
        ("prompts: [x]\nextra: 1\n" + TESTS, 2, "'extra' is not known"),
        ("prompts: [x]\ntests:\n  - vars: {}\n    asert: []\n", 4, "'asert' is not known"),
        ("prompts: [x]\ntests:\n  - assert: [{type: contains, value: x, provider: y}]\n", 3, "'provider'"),
        ("prompts: [x]\noptions: {temperature: warm}\n" + TESTS, 2, "temperature"),
        ("prompts: [x]\ntests:\n  - threshold: 2\n    assert: []\n", 3, "threshold"),
        ("prompts: []\n" + TESTS, 1, "prompts"),
        ("prompts: [x]\n", 1, "tests"),
        ("- 1\n", 1, "the file"),
        ("prompts: [{label: a, raw: x}, {label: a, raw: y}]\n" + TESTS, 1, "label 'a'"),
        ("prompts: [{raw: [{role: robot, content: x}]}]\n" + TESTS, 1, "role"),
        (
            "prompts: [x]\ntests:\n  - prompts: [other]\n    assert: [{type: contains, value: x}]\n",
            3,
            "no prompt 'other'",
        ),
        ("prompts: [x]\ntests: file://../secret.jsonl\n", 2, "lie in its folder"),
        ("prompts: [file:///etc/passwd]\n" + TESTS, 1, "lie in its folder"),
        ("prompts: [x]\ntests: file://tests.csv\n", 2, "file://NAME.jsonl"),
        ("prompts: ['[1, 2']\n" + TESTS, 1, "no JSON"),
        ("prompts: [x]\ntests:\n  - assert: [{type: is-json, value: {if: true}}]\n", 3, "keyword 'if'"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.message.startswith(f"suite.yaml, line {line}: "), caught.value
    assert reason in str(caught.value)


def test_errors_of_data_name_its_line(tmp_path: Path) -> None:
    write(tmp_path, '{"assert": [{"type": "regex", "value": "."}]}\n{"vars": 5}\n', "data.jsonl")
    with pytest.raises(ConfigError, match=r"data\.jsonl, line 2: vars"):
        load(tmp_path, "prompts: [x]\ntests: file://data.jsonl\n")


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    folder = tmp_path / "suites"
    folder.mkdir()
    (tmp_path / "secret.jsonl").write_text("{}")
    (folder / "data.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(ConfigError, match="lie in its folder"):
        load(folder, "prompts: [x]\ntests: file://data.jsonl\n")


def test_variables_cannot_multiply_without_end(tmp_path: Path) -> None:
    values = ", ".join(f"v{n}: [1, 2, 3, 4, 5, 6, 7, 8, 9]" for n in range(9))
    with pytest.raises(ConfigError, match="more than 5000 cases"):
        load(tmp_path, f"prompts: [x]\ntests:\n  - vars: {{{values}}}\n    assert: [{{type: contains, value: x}}]\n")


def test_damaged_suites_are_errors_never_faults(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    source = random.Random(seed)
    words = [b"[", b"]", b"{{", b"}}", b": ", b"- ", b"\n", b"  ", b"'", b'"', b"&a ", b"*a", b"!!int ", b"null"]
    words += [b"1e9", b"\x00", b"\xff", b"\t", b"%", b"?", b"|\n", b"file://", b"\xe2\x80\xa8"]
    good = 0
    for _ in range(150):
        data = bytearray(SMALL.encode())
        for _ in range(source.randrange(1, 4)):
            at = source.randrange(len(data))
            data[at : at + source.choice((0, 0, 1, 9))] = source.choice(words)
        path = tmp_path / "damaged.yaml"
        path.write_bytes(data)
        with suppress(ConfigError):
            good += bool(load_suite(path).cases)
    assert 0 < good < 150


def test_a_suite_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no suite 'factoree'") as caught:
        load_suite("factoree")
    assert "code, factory, maths" in caught.value.hint


@pytest.mark.parametrize("name", built_in_suites())
def test_suites_that_come_with_it(name: str) -> None:
    suite = load_suite(name)
    assert suite.description
    assert suite.licence
    assert len({case.id for case in suite.cases}) == len(suite.cases)
    assert suite.runs_code == (name == "code")


def test_the_factory_speaks_three_languages() -> None:
    count: dict[tuple[Any, Any], int] = {}
    for case in load_suite("factory").cases:
        key = case.metadata["task"], case.metadata["language"]
        count[key] = count.get(key, 0) + 1
    assert {language for _, language in count} == {"en", "de", "zh"}
    assert len(count) == 12
    assert min(count.values()) >= 4
    assert sum(count.values()) >= 40


def test_the_example_of_the_documentation_is_a_suite(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    suite = load(tmp_path, text.partition("```yaml\n")[2].partition("```")[0])
    assert [case.id for case in suite.cases] == ["1/1", "1/examples", "2", "3"]
    assert suite.cases[1].body["max_tokens"] == 8
    assert suite.cases[0].checks[0].judge(Answer("Kugellager.", 1)).passed


def test_the_documentation_names_every_assertion() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = text.partition("| assertion |")[2].partition("\n\n")[0]
    assert {name for name in TYPES if f"`{name}`" not in table} == set()


def test_the_wheel_has_the_suites(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"edge/evaluation/suites/{path.name}" for path in BUILT_IN.iterdir()} <= names
    assert {"export/report.txt", "export/peers.json"} <= names
